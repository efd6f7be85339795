"""Public functions over the ops; arguments are checked here, backends chosen below."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference, schema
from ._cpu import pack_weight
from .dispatch import table, use_backend

__all__ = ["gated_linear", "pack_weight", "pruned_linear", "table", "use_backend"]


def gated_linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    r: Tensor | None = None,
    c: Tensor | None = None,
    *,
    closed_row_grad: bool = True,
    backend: str = "auto",
) -> Tensor:
    """y = r ⊙ ((x ⊙ c) wᵀ + b), with gradients to every operand and no extra saved activation.

    The row gate multiplies the bias too, so that a closed row is exactly 0. Under autocast the
    operands are cast to its dtype, as ``F.linear`` does.

    Args:
        x (`Tensor` [..., K]): input, any leading shape.
        w (`Tensor` [N, K]): weight of x's dtype and device; b (`Tensor` [N], *optional*).
        r (`Tensor` [N], *optional*), c (`Tensor` [K], *optional*): gate values; cast to w's dtype.
        closed_row_grad: whether rows with r = 0 get their gradient dr (one more GEMM over those
            rows); False where r's own derivative is 0 there anyway.
        backend: see `use_backend`.

    Returns:
        `Tensor` [..., N].

    Raises:
        ValueError: shapes, dtypes or devices don't fit.

    Source: FineGates, arXiv 2602.09169; gradients as derived in docs/method.md.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, b = x.to(dtype), w.to(dtype), None if b is None else b.to(dtype)
    _check_operands(x, w, b)
    r = _gate_operand("r", r, w, 0)
    c = _gate_operand("c", c, w, 1)
    y: Tensor = schema.ops.gated_linear.default(x, w, b, r, c, closed_row_grad, backend)
    return y


def pruned_linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    out_features: int | None = None,
    *,
    packed: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y[..., rows] = act(x[..., columns] wᵀ + b), every other output exactly 0, plus the residual.

    Differentiable in x, w, b and the residual: with gradients wanted it runs the reference, since
    the native kernels are for inference.

    Args:
        x (`Tensor` [..., K]): input, any leading shape.
        w (`Tensor` [n, k]): compact weight; b (`Tensor` [n], *optional*): compact bias.
        rows (`Tensor` int32 [n], *optional*): sorted kept output features, None for all.
        columns (`Tensor` int32 [k], *optional*): sorted kept input features, None for all.
        out_features: N, defaults to n.
        packed (`Tensor` uint8): `pack_weight(w)`, made on the fly when absent.
        activation: ``"none"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or ``"relu"``.
        residual (`Tensor` [..., N], *optional*): added to the result.
        backend: see `use_backend`.

    Returns:
        `Tensor` [..., N] of x's dtype.

    Raises:
        ValueError: shapes, devices or the activation don't fit.
    """
    out_features = w.shape[0] if out_features is None else out_features
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, w, b, residual)
    ):
        return reference.pruned_linear(x, w, b, rows, columns, out_features, activation, residual)
    y: Tensor = schema.ops.pruned_linear.default(
        x, w, packed, b, rows, columns, out_features, activation, residual, backend
    )
    return y


def _check_operands(x: Tensor, w: Tensor, b: Tensor | None) -> None:
    if w.dim() != 2:
        raise ValueError(f"w must have 2 dimensions, got shape {tuple(w.shape)}")
    if x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"x must have a last dimension of {w.shape[1]}, got shape {tuple(x.shape)}"
        )
    if x.dtype != w.dtype:
        raise ValueError(f"x must have w's dtype {w.dtype}, got {x.dtype}")
    if x.device != w.device:
        raise ValueError(f"x must be on w's device {w.device}, got {x.device}")
    if b is not None and b.shape != w.shape[:1]:
        raise ValueError(f"b must have shape ({w.shape[0]},), got {tuple(b.shape)}")


def _gate_operand(name: str, gate: Tensor | None, w: Tensor, side: int) -> Tensor | None:
    if gate is None:
        return None
    if gate.shape != (w.shape[side],):
        raise ValueError(f"{name} must have shape ({w.shape[side]},), got {tuple(gate.shape)}")
    return gate.to(w.dtype)
