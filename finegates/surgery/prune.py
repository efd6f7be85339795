"""`prune_`: take closed rows and columns out of a gated model, exactly."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ..nn import FusedGatedLinear, PrunedLinear
from .budget import GateMap
from .couplings import Side
from .record import record_pruned

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def prune_(model: Model) -> Model:
    """Remove every dead row and column in place; the outputs stay those of the gated model.

    A unit is dead when any side of its coupling is closed (DESIGN §2.2). Fractional gates fold into
    the weight: r into rows and bias, c into columns. Layers keep the sizes their neighbours see;
    only MLP-inner features, which nothing else sees, become compact. A layer that loses nothing
    becomes a plain `nn.Linear`. The removal can't be undone; keep the gated model to change it.

    Args:
        model: a model that `gate_` has gated.

    Returns:
        The same model, without gates.

    Raises:
        ValueError: the model has no gated layer.
    """
    gates = GateMap(model)
    alive = {side: margin > 0 for side, margin in gates.margins().items()}
    compact = {side for c in gates.couplings if c.private for side in c.sides}
    replacements = {
        name: _replace(name, linear, alive, compact) for name, linear in gates.linears.items()
    }
    shared = _shared_weights(model, gates)
    for name, replacement in replacements.items():
        model.set_submodule(name, replacement)
    if shared:
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    record_pruned(model)
    return model


def _replace(
    name: str, linear: nn.Linear, alive: dict[Side, Tensor], compact: set[Side]
) -> nn.Linear | PrunedLinear:
    folded = _fold(linear)
    row, column = Side(name, "row"), Side(name, "column")
    rows = None if alive[row].all() else alive[row].nonzero().squeeze(1)
    columns = None if alive[column].all() else alive[column].nonzero().squeeze(1)
    if rows is None and columns is None:
        return folded
    pruned = PrunedLinear.from_linear(folded, rows, columns)
    if row in compact and pruned.rows is not None:
        pruned.out_features, pruned.rows = pruned.weight.shape[0], None
    if column in compact and pruned.columns is not None:
        pruned.in_features, pruned.columns = pruned.weight.shape[1], None
    return pruned


def _fold(linear: nn.Linear) -> nn.Linear:
    """Return a plain Linear that computes what the layer's evaluation gates compute."""
    weight = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    if isinstance(linear, FusedGatedLinear):
        if linear.row_gate is not None:
            r = linear.row_gate.value().to(weight.dtype)
            weight = weight * r[:, None]
            bias = None if bias is None else bias * r
        if linear.column_gate is not None:
            weight = weight * linear.column_gate.value().to(weight.dtype)
    folded = nn.Linear(linear.in_features, linear.out_features, bias is not None, device="meta")
    folded.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        folded.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    return folded.train(linear.training)


def _shared_weights(model: nn.Module, gates: GateMap) -> bool:
    """Return whether a gated weight is another module's parameter too (a tied output embedding)."""
    owned = {id(layer.weight) for layer in gates.layers.values()}
    return any(
        id(parameter) in owned and name.removesuffix(".weight") not in gates.layers
        for name, parameter in model.named_parameters(remove_duplicate=False)
    )
