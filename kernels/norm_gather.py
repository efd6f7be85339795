"""RMSNorm or LayerNorm that stores the kept columns only: the producer of a compact input."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import GATHER_ROWS, OPTIONS, ROW_WISE


@triton.jit
def _norm_gather_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, columns_ptr, y_ptr, K, count, stride_xm, stride_xk, eps,
    NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: statistics over all K features, then its kept ones, side by side.

    The row is read from memory once; the passes after the first find it in L1 or L2.
    """
    m = tl.program_id(0).to(tl.int64)
    x_ptr += m * stride_xm
    mean = 0.0
    scale = 1.0
    if NORM != "none":
        if NORM == "layer":
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, K, BLOCK):
                k = start + tl.arange(0, BLOCK).to(tl.int64)
                total += tl.load(x_ptr + k * stride_xk, mask=k < K, other=0.0).to(tl.float32)
            mean = tl.sum(total) / K
        square = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK).to(tl.int64)
            x = tl.load(x_ptr + k * stride_xk, mask=k < K, other=0.0).to(tl.float32)
            x = tl.where(k < K, x - mean, 0.0)
            square += x * x
        scale = 1.0 / tl.sqrt(tl.sum(square) / K + tl.to_tensor(eps).to(tl.float32))
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        column = tl.load(columns_ptr + j, mask=j < count, other=0)
        y = tl.load(x_ptr + column * stride_xk, mask=j < count, other=0.0).to(tl.float32)
        if NORM != "none":
            y = (y - mean) * scale
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + column, mask=j < count, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask=j < count, other=0.0).to(tl.float32)
        tl.store(y_ptr + m * count + j, y.to(y_ptr.dtype.element_ty), mask=j < count)


def norm_gather_fwd(
    x: Tensor,
    columns: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    norm: str = "none",
) -> Tensor:
    """Launch on x [M, K] and columns int32 [k]; ``norm`` is ``"none"``, ``"rms"`` or ``"layer"``.

    Returns:
        y [M, k] of x's dtype, contiguous.
    """
    (m, k), count = x.shape, columns.shape[0]
    y = torch.empty(m, count, dtype=x.dtype, device=x.device)
    if y.numel():
        _norm_gather_fwd_kernel[(m,)](
            x, weight, bias, columns, y, k, count, *x.stride(), eps,
            NORM=norm, **ROW_WISE, **OPTIONS,
        )  # fmt: skip
    return y


def gather_columns(x: Tensor, columns: Tensor | None, always: bool = False) -> tuple[Tensor, bool]:
    """Return x [M, kept] and True, or x as it is and False: few tokens the GEMM's loads gather."""
    if columns is None:
        return x, True
    if always or x.shape[0] > GATHER_ROWS:
        return norm_gather_fwd(x, columns), True
    return x, False
