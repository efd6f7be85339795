"""Train on what is left: gated layers that compute with their living rows and columns alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.index_map import trust_index_map
from .budget import GateMap, on_host
from .couplings import Side


def shrink_(gates: GateMap) -> None:
    """Let every ranking layer compute with its living part until one of its gates changes.

    The outputs stay those of the gates, forward and backward, except that closed gates get no
    gradient. Units between the Linears of an MLP, which nothing else sees, are left out of the
    activations too.
    """
    _keep(gates, on_host(gates.alive()))
    together: dict[str, tuple[str, ...]] = {name: (name,) for name in gates.layers}
    inner: set[Side] = set()
    for coupling in gates.couplings:
        names = tuple(side.module for side in coupling.sides if side.module in gates.layers)
        together.update(dict.fromkeys(names, names))
        if coupling.private and len(names) == len(coupling.sides):
            inner.update(coupling.sides)
    for name, layer in gates.layers.items():
        row, column = Side(name, "row"), Side(name, "column")
        layer.shrink_(
            gates.kept[row][1],
            gates.kept[column][1],
            inner_rows=row in inner,
            inner_columns=column in inner,
            sources=_sources(gates, together[name]),
        )


def expand_(gates: GateMap) -> None:
    """Let every layer compute with its whole weight again."""
    for layer in gates.layers.values():
        layer.expand_()


def _keep(gates: GateMap, alive: dict[Side, Tensor]) -> None:
    """Make the maps of the sides that have moved; a side that hasn't keeps its map.

    They reach a GPU in one transfer, each at a multiple of 16 bytes, as the kernels like their
    operands.
    """
    moved: dict[torch.device, dict[Side, Tensor]] = {}
    for name, layer in gates.layers.items():
        device = layer.weight.device
        for side in (Side(name, "row"), Side(name, "column")):
            mask = alive[side]
            last, index = gates.kept.get(side, (None, None))
            here = index is None or index.device == device
            if here and last is not None and torch.equal(last, mask):
                continue
            gates.kept[side] = (mask, None)
            if not mask.all():
                moved.setdefault(device, {})[side] = mask.nonzero().squeeze(1).int()
    for device, indices in moved.items():
        padded = [F.pad(index, (0, -len(index) % 4)) for index in indices.values()]
        there = torch.cat(padded).to(device, non_blocking=True)
        parts = torch.split(there, [len(index) for index in padded])
        for (side, index), part in zip(indices.items(), parts, strict=True):
            kept = part[: len(index)]
            trust_index_map(kept, len(alive[side]))
            gates.kept[side] = (alive[side], kept)


def _sources(gates: GateMap, names: tuple[str, ...]) -> list[Tensor]:
    """Return what the living part of these layers depends on; they go stale together."""
    sources: list[Tensor] = []
    for name in names:
        layer = gates.layers[name]
        sources += [gate.logits for gate in (layer.row_gate, layer.column_gate) if gate is not None]
        if not layer.weight.requires_grad:
            sources.append(layer.weight)
    return sources
