"""Importance of units by their weights, with no training: what one-shot pruning ranks by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..gates import Gate
from .budget import GateMap
from .couplings import AXES, Side


@torch.no_grad()
def rank_by_weights_(gates: GateMap, norms: Mapping[str, Tensor] | None = None) -> None:
    """Set every logit to the log of its unit's importance, so that `project_` closes the least.

    The importance of a unit is the sum over all weights that die with it, couplings included,

        Σ |w_nk| ‖x_k‖    (Wanda's score, arXiv 2306.11695, summed over a unit as FLAP does,
                           arXiv 2312.11983; without norms Σ |w_nk|, the magnitude)

    divided by the mean over its gate's units, since sums of different layers have no common scale.

    Args:
        gates: the gated model's map; with ``tie="none"`` a gate's unit is its own row or column.
        norms: per Linear ‖x_k‖ [K], from `input_norms`; None ranks by magnitude.
    """
    sums: dict[int, Tensor] = {}
    for side, gate in gates.deciding().items():
        if gate is not None:
            own = _per_unit(gate, _side_sums(gates.linears[side.module], side, norms))
            key = id(gate.logits)
            sums[key] = sums[key] + own if key in sums else own
    for gate in gates.gates():
        importance = sums[id(gate.logits)]
        gate.logits.copy_(torch.log(importance / importance.mean()).clamp(min=-1e4))


@torch.no_grad()
def input_norms(
    model: nn.Module, linears: Mapping[str, nn.Linear], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Return ‖x_k‖₂ [K] in fp32 over all tokens of the batches, per Linear.

    Args:
        model: called as ``model(**batch)``.
        linears: layers of the model by name.
        batches: calibration inputs; no labels needed.
    """
    squares = {
        name: torch.zeros(linear.in_features, device=linear.weight.device)
        for name, linear in linears.items()
    }

    def adding(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares[name] += inputs[0].float().square().flatten(0, -2).sum(0)

        return add

    hooks = [linear.register_forward_pre_hook(adding(name)) for name, linear in linears.items()]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            model(**batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {name: square.sqrt() for name, square in squares.items()}


def _side_sums(linear: nn.Linear, side: Side, norms: Mapping[str, Tensor] | None) -> Tensor:
    scores = linear.weight.float().abs()
    if norms is not None:
        scores = scores * norms[side.module]
    return scores.sum(1 - AXES.index(side.axis))


def _per_unit(gate: Gate, features: Tensor) -> Tensor:
    """Sum a side's per-feature values [size] over each unit of the gate that decides them."""
    if gate.layout is None:
        return features
    groups, _, _, width = gate.layout
    return features.view(groups, -1, width).sum(1).reshape(-1)
