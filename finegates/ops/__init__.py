"""Public functions over the ops; arguments are checked here, backends chosen below."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference, schema
from ._triton import INTERPRETED, alignment
from .checks import (
    autocasts,
    check_choice,
    check_dtype,
    check_matrix,
    check_residual,
    check_vector,
    transformed,
    wants_gradient,
)
from .decoder import decoder
from .dispatch import check_differentiable, table, use_backend
from .encoder import encoder_layer
from .packed import (
    pack,
    packed_embedding,
    packed_glu,
    packed_linear,
    packed_linears,
    unpack,
)
from .sampled import gated_matmul, norm_gather, open_mass

__all__ = [
    "INTERPRETED",
    "alignment",
    "decoder",
    "encoder_layer",
    "gated_linear",
    "gated_matmul",
    "norm_gather",
    "open_mass",
    "pack",
    "packed_embedding",
    "packed_glu",
    "packed_linear",
    "packed_linears",
    "pruned_linear",
    "table",
    "unpack",
    "use_backend",
]


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
    operands are cast to its dtype, as ``F.linear`` does. Where r gets a gradient y is kept for it,
    so that y can't be changed in place then (autograd says so).

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
    if autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, b = x.to(dtype), w.to(dtype), None if b is None else b.to(dtype)
    check_matrix(x, w)
    check_dtype("x", x, w)
    if b is not None:
        check_vector("b", b, w, 0)
        check_dtype("b", b, w)
    if r is not None:
        check_vector("r", r, w, 0)
        r = r.to(w.dtype)
    if c is not None:
        check_vector("c", c, w, 1)
        c = c.to(w.dtype)
    if transformed():
        check_differentiable("gated_linear", backend)
        return reference.gated_linear(x, w, b, r, c)
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
    activation: str = "none",
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y[..., rows] = act(x[..., columns] wᵀ + b), every other output exactly 0, plus the residual.

    Differentiable in x, w, b and the residual: with gradients wanted, and under torch.func and
    forward-mode AD, it runs the reference, since the kernels are for inference; naming another
    backend raises then. The native kernels pack w on first use, and again when an operand has
    changed or an optimizer has stepped. Under autocast x and the residual are cast to its
    dtype and the weight keeps its own.

    Args:
        x (`Tensor` [..., K]): input, any leading shape.
        w (`Tensor` [n, k]): compact weight; b (`Tensor` [n], *optional*): compact bias.
        rows (`Tensor` int32 [n], *optional*): sorted kept output features, None for all.
        columns (`Tensor` int32 [k], *optional*): sorted kept input features, None for all.
        out_features: N, defaults to n.
        activation: ``"none"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or ``"relu"``.
        residual (`Tensor` [..., N], *optional*): of x's dtype, added to the result.
        backend: see `use_backend`.

    Returns:
        `Tensor` [..., N] of x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or the activation don't fit, or the backend can't serve.
    """
    out_features = w.shape[0] if out_features is None else out_features
    if autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        residual = None if residual is None else residual.to(x.dtype)
    else:
        check_dtype("x", x, w)
    check_matrix(x, w, every_column=columns is None)
    for name, vector, side in (("b", b, 0), ("rows", rows, 0), ("columns", columns, 1)):
        if vector is not None:
            check_vector(name, vector, w, side)
    if out_features < w.shape[0] or (rows is None and out_features != w.shape[0]):
        raise ValueError(f"out_features must fit w's {w.shape[0]} rows, got {out_features}")
    check_choice("activation", activation, reference.ACTIVATIONS)
    check_residual(residual, x, out_features)
    if wants_gradient(x, w, b, residual) or transformed():
        check_differentiable("pruned_linear", backend)
        return reference.pruned_linear(x, w, b, rows, columns, out_features, activation, residual)
    y: Tensor = schema.ops.pruned_linear.default(
        x, w, b, rows, columns, out_features, activation, residual, backend
    )
    return y
