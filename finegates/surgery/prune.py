"""`prune_`: take closed rows and columns out of a gated model, exactly."""

from __future__ import annotations

from typing import Any, TypeVar

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

    A unit is dead when any side of its coupling is closed, see docs/method.md. A LoRA is added to
    the weight, then fractional gates fold into it: r into rows and bias, c into columns. Layers
    keep the sizes their neighbours see; only MLP-inner features, which nothing else sees, become
    compact. A layer that loses nothing becomes a plain `nn.Linear`. The removal can't be undone;
    keep the gated model to change it.

    Args:
        model: a model that `gate_` has gated.

    Returns:
        The same model, without gates.

    Raises:
        ValueError: the model has no gated layer, is one itself, or has a NaN logit.
    """
    if isinstance(model, FusedGatedLinear):
        raise ValueError("model is a FusedGatedLinear itself; put it in a container to replace it")
    gates = GateMap(model)
    alive = gates.alive()
    compact = {side for c in gates.couplings if c.private for side in c.sides}
    replacements = {
        name: _replace(name, linear, alive, compact) for name, linear in gates.linears.items()
    }
    shared = _shared_weights(model, gates)
    for name, replacement in replacements.items():
        model.set_submodule(name, replacement)
    if shared:
        _untie_embeddings(model)
    record_pruned(model)
    return model


def _replace(
    name: str, linear: nn.Linear, alive: dict[Side, Tensor], compact: set[Side]
) -> nn.Linear | PrunedLinear:
    row, column = Side(name, "row"), Side(name, "column")
    rows = None if alive[row].all() else alive[row].nonzero().squeeze(1)
    columns = None if alive[column].all() else alive[column].nonzero().squeeze(1)
    folded = _fold(linear) if isinstance(linear, FusedGatedLinear) else linear
    if rows is None and columns is None:
        return folded
    pruned = PrunedLinear.from_linear(folded, rows, columns)
    if row in compact and pruned.rows is not None:
        pruned.out_features, pruned.rows = pruned.weight.shape[0], None
    if column in compact and pruned.columns is not None:
        pruned.in_features, pruned.columns = pruned.weight.shape[1], None
    return pruned


def _fold(linear: FusedGatedLinear) -> nn.Linear:
    """Return a plain Linear that computes what the layer's evaluation gates compute.

    The gate values are those of the gated layer, rounded to the weight's dtype; their product with
    the weight is taken in fp32 at least and rounded once.
    """
    dtype = linear.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    weight = linear.weight.detach().to(wide)
    if linear.lora is not None:
        weight = weight + linear.lora.delta().to(wide)
    bias = None if linear.bias is None else linear.bias.detach().to(wide)
    if linear.row_gate is not None:
        r = linear.row_gate.value().to(dtype).to(wide)
        weight = weight * r[:, None]
        bias = None if bias is None else bias * r
    if linear.column_gate is not None:
        weight = weight * linear.column_gate.value().to(dtype).to(wide)
    folded = nn.Linear(linear.in_features, linear.out_features, bias is not None, device="meta")
    folded.weight = nn.Parameter(weight.to(dtype), linear.weight.requires_grad)
    if bias is not None:
        folded.bias = nn.Parameter(bias.to(dtype), linear.bias.requires_grad)
    return folded.train(linear.training)


def _shared_weights(model: nn.Module, gates: GateMap) -> bool:
    """Return whether a gated weight is another module's parameter too (a tied output embedding)."""
    owned = {id(layer.weight) for layer in gates.layers.values()}
    return any(
        id(parameter) in owned and name.removesuffix(".weight") not in gates.layers
        for name, parameter in model.named_parameters(remove_duplicate=False)
    )


def _untie_embeddings(model: nn.Module) -> None:
    """Keep transformers from tying a pruned output embedding to the input embedding again."""
    config: Any = getattr(model, "config", None)
    texts = [config.get_text_config()] if hasattr(config, "get_text_config") else []
    for part in (config, *texts):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
