"""Train on what is left: gated layers that compute with their living rows and columns alone."""

from __future__ import annotations

from torch import Tensor

from .budget import GateMap
from .couplings import Side


def shrink_(gates: GateMap) -> None:
    """Let every ranking layer compute with its living part until one of its gates changes.

    The outputs stay those of the gates, forward and backward, except that closed gates get no
    gradient. Units between the Linears of an MLP, which nothing else sees, are left out of the
    activations too.
    """
    alive = gates.alive()
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
            _kept(alive[row]),
            _kept(alive[column]),
            inner_rows=row in inner,
            inner_columns=column in inner,
            sources=_sources(gates, together[name]),
        )


def expand_(gates: GateMap) -> None:
    """Let every layer compute with its whole weight again."""
    for layer in gates.layers.values():
        layer.expand_()


def _kept(alive: Tensor) -> Tensor | None:
    return None if alive.all() else alive.nonzero().squeeze(1).int()


def _sources(gates: GateMap, names: tuple[str, ...]) -> list[Tensor]:
    """Return what the living part of these layers depends on; they go stale together."""
    sources: list[Tensor] = []
    for name in names:
        layer = gates.layers[name]
        sources += [gate.logits for gate in (layer.row_gate, layer.column_gate) if gate is not None]
        if not layer.weight.requires_grad:
            sources.append(layer.weight)
    return sources
