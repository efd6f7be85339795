"""Sparsity objectives of the stochastic gates, as pure functions of open probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fraction_penalty(rows: Sequence[Tensor], columns: Sequence[Tensor], target: float) -> Tensor:
    """|1 - Σₗ (Σ pᵣ)(Σ p_c) / Σₗ N K - target|: the expected removed fraction against its target.

    Args:
        rows, columns: for each layer the open probabilities [N] and [K], couplings resolved.
        target: fraction of the parameters to remove.

    Returns:
        A scalar in [0, 1].
    """
    layers = list(zip(rows, columns, strict=True))
    kept = torch.stack([r.sum() * c.sum() for r, c in layers]).sum()
    total = sum(r.numel() * c.numel() for r, c in layers)
    return (1.0 - kept / total - target).abs()


def fraction_penalty_of_masses(masses: Tensor, total: int, target: float) -> Tensor:
    """`fraction_penalty` from the sums of P(open) over rows and columns of each layer [L, 2]."""
    return (1.0 - masses.prod(1).sum() / total - target).abs()


def per_axis_penalty(rows: Sequence[Tensor], columns: Sequence[Tensor], target: float) -> Tensor:
    """Mean over layers and sides of |mean p - (1 - target)|: the authors' objective.

    It constrains each side of each layer, not the parameters: with both sides at ``1 - target`` the
    removed fraction would be 1 - (1 - target)².

    Args:
        rows, columns: for each layer the open probabilities [N] and [K].
        target: fraction of every side to close.

    Returns:
        A scalar in [0, 1].

    Source: ``SparseLayer.sparsity_loss`` in the authors' ``model.py``.
    """
    sides = [*rows, *columns]
    means = torch.stack([side.mean() for side in sides])
    return (means - (1.0 - target)).abs().mean()
