"""Train on what is left: gated layers that compute with their living rows and columns alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import Held
from ..ops import alignment
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


def held_of(alive: Tensor, multiple: int) -> Held:
    """Return a side's living features, filled up with dead ones to a multiple of their number.

    A layer's compact weight is 0 there, so that no result changes. Where the side has not as many,
    none are added.

    Args:
        alive (`Tensor` bool [size]): which features live.
        multiple: see `alignment`.
    """
    dead = (~alive).nonzero().squeeze(1)
    spare = -int(alive.sum()) % multiple
    kept = alive if spare > len(dead) else alive.index_fill(0, dead[:spare], True)
    features = None if kept.all() else kept.nonzero().squeeze(1).int()
    return Held(features, None if torch.equal(kept, alive) else alive[kept].int())


def _keep(gates: GateMap, alive: dict[Side, Tensor]) -> None:
    """Find what is held of the sides that have moved; a side that hasn't keeps its own."""
    moved: dict[torch.device, dict[Side, Held]] = {}
    for name, layer in gates.layers.items():
        device = layer.weight.device
        for side in (Side(name, "row"), Side(name, "column")):
            mask = alive[side]
            last, held = gates.kept.get(side, (None, Held()))
            here = all(tensor is None or tensor.device == device for tensor in held)
            if here and last is not None and torch.equal(last, mask):
                continue
            moved.setdefault(device, {})[side] = held_of(mask, alignment(device))
    for device, sides in moved.items():
        there = iter(_send([t for held in sides.values() for t in held if t is not None], device))
        for side, held in sides.items():
            features, living = (None if tensor is None else next(there) for tensor in held)
            if features is not None:
                trust_index_map(features, len(alive[side]))
            gates.kept[side] = (alive[side], Held(features, living))


def _send(indices: list[Tensor], device: torch.device) -> list[Tensor]:
    """Move int32 vectors in one transfer, each at a multiple of 16 bytes, as the kernels like."""
    if not indices:
        return []
    padded = [F.pad(index, (0, -len(index) % 4)) for index in indices]
    there = torch.cat(padded).to(device, non_blocking=True)
    parts = torch.split(there, [len(index) for index in padded])
    return [part[: len(index)] for part, index in zip(parts, indices, strict=True)]


def _sources(gates: GateMap, names: tuple[str, ...]) -> list[Tensor]:
    """Return what the living part of these layers depends on; they go stale together."""
    sources: list[Tensor] = []
    for name in names:
        layer = gates.layers[name]
        sources += [gate.logits for gate in (layer.row_gate, layer.column_gate) if gate is not None]
        if not layer.weight.requires_grad:
            sources.append(layer.weight)
    return sources
