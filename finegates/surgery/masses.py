"""Expected open features of all sides at once: one concatenation and one op for any number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gates import Gate
from ..ops import open_mass
from .budget import GateMap
from .couplings import Side


class Masses:
    """Σ P(open) over the features of each side, differentiable in the logits.

    Args:
        sides: per side the gate that decides it, None for one that is always open, and its number
            of features; with 1 for that number the result is the mean.
    """

    def __init__(self, sides: Sequence[tuple[Gate | None, int]]) -> None:
        distinct: dict[int, Gate] = {}
        for gate, _ in sides:
            if gate is not None:
                distinct.setdefault(id(gate.logits), gate)
        self.gates = list(distinct.values())
        order = {key: position for position, key in enumerate(distinct)}
        offsets, places, features = [0], [], []
        for gate in self.gates:
            offsets.append(offsets[-1] + gate.logits.numel())
        for gate, size in sides:
            # The last place holds the constant 1: a side without a gate counts all its features.
            places.append(len(order) if gate is None else order[id(gate.logits)])
            features.append(size if gate is None else size / gate.logits.numel())
        self._host = (torch.tensor(offsets), torch.tensor(places), torch.tensor(features))
        self._here = self._host

    def __call__(self) -> Tensor:
        """Return the sums [sides] in fp32."""
        logits = torch.cat([gate.logits for gate in self.gates])
        if self._here[0].device != logits.device:
            offsets, places, features = (t.to(logits.device) for t in self._host)
            self._here = (offsets, places, features)
        offsets, places, features = self._here
        config = self.gates[0].config
        mass = open_mass(logits, offsets, config.distribution, *config.open_constants)
        return torch.cat((mass, features.new_ones(1)))[places] * features


def layer_masses(gates: GateMap) -> Masses | None:
    """Return the masses of rows and columns of each gated layer in turn, couplings resolved.

    None where a coupling has independent gates: its units' probabilities are products, which a sum
    per gate doesn't give (`GateMap.open_probabilities` does).
    """
    for coupling in gates.couplings:
        gated = any(gates.gate(side) is not None for side in coupling.sides)
        if gated and not gates.is_tied(coupling):
            return None
    deciding = gates.deciding()
    sides = []
    for name, layer in gates.layers.items():
        sides.append((deciding[Side(name, "row")], layer.out_features))
        sides.append((deciding[Side(name, "column")], layer.in_features))
    return Masses(sides)


def own_means(gates: GateMap) -> Masses:
    """Return the mean P(open) of every side that has a gate, by that gate alone."""
    own = [gate for side in gates.sides() if (gate := gates.gate(side)) is not None]
    return Masses([(gate, 1) for gate in own])
