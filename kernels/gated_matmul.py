"""The gated Linear's forward kernel: y[:, rows] = act(r ⊙ ((x[:, columns] ⊙ c) wᵀ + b)).

Letters as in docs/kernels.md: x [M, K], w [N, K], y [M, N]. With index maps w holds the kept (or
reordered) rows and columns only: position n of w is feature ``rows[n]`` of y and of r, position k
is feature ``columns[k]`` of x and of c. Gates live in feature space, w and b in position space.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gate import (
    activate,
    feature_of,
    fill_gaps,
    fill_gate,
    gate_tile,
    tile_count,
    tile_order,
)
from .launch import aligned, cdiv, gemm_options, gemm_tile
from .norm_gather import gather_columns
from .operands import Gates, Weight


@triton.jit
def gated_dot(
    x_ptr, w_ptr, c_ptr, columns_ptr, m, n, end, M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, GATHERED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the fp32 tile (x ⊙ c) wᵀ over the positions 0 … end; c is applied in registers.

    With ``GATHERED`` x has w's columns only, side by side: 16-byte loads straight to shared memory,
    where a gather takes an address and a load per element.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + m[:, None] * stride_xm
    w_ptrs = w_ptr + n[None, :] * stride_wn + k[:, None] * stride_wk
    for start in range(0, end, BLOCK_K):
        inside = k < K - start
        column = start + k
        if c_ptr is not None or not GATHERED:
            column = feature_of(columns_ptr, column, inside)
        x_mask = (m < M)[:, None] & inside[None, :]
        at = start + k if GATHERED else column
        x = tl.load(x_ptrs + at[None, :] * stride_xk, mask=x_mask, other=0.0)
        w = tl.load(w_ptrs, mask=(n < N)[None, :] & inside[:, None], other=0.0)
        if c_ptr is not None:
            c = tl.load(c_ptr + column, mask=inside, other=0.0)
            x = x * c.to(x.dtype)[None, :]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        w_ptrs += tl.full((), BLOCK_K, tl.int64) * stride_wk
    return acc


@triton.jit
def _gated_matmul_fwd_kernel(
    x_ptr, w_ptr, b_ptr, residual_ptr, y_ptr, r_ptr, c_ptr, row_logits_ptr, column_logits_ptr,
    seed_ptr, rows_ptr, columns_ptr, M, N, K, N_out,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ym, stride_residual,
    row_span, row_width, column_span, column_width, shift, scale, beta,
    ROW: tl.constexpr, COLUMN: tl.constexpr, ACTIVATION: tl.constexpr, GATHERED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_n = tile_count(N, BLOCK_N)
    pid_m, pid_n = tile_order(tl.program_id(0), tile_count(M, BLOCK_M), tiles_n, GROUP_M)
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = K
    if COLUMN != "none":
        end = fill_gate(
            c_ptr, column_logits_ptr, seed_ptr, columns_ptr, K, column_span, column_width,
            shift, scale, beta, COLUMN, 1,
        )  # fmt: skip
    row = feature_of(rows_ptr, n, n < N)
    if ROW != "none":
        r = gate_tile(
            r_ptr, row_logits_ptr, seed_ptr, row.to(tl.int32), n < N, row_span, row_width,
            shift, scale, beta, ROW, 0,
        )  # fmt: skip
        if ROW != "value":
            tl.store(r_ptr + row, r, mask=n < tl.where(pid_m == 0, N, 0))
        end = tl.where(tl.max((r != 0.0).to(tl.int32)) > 0, end, 0)
    acc = gated_dot(
        x_ptr, w_ptr, c_ptr, columns_ptr, m, n, end, M, N, K,
        stride_xm, stride_xk, stride_wn, stride_wk, GATHERED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if b_ptr is not None:
        acc += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if ROW != "none":
        acc *= r[None, :]
    acc = activate(acc, ACTIVATION)
    mask = (m < M)[:, None] & (n < N)[None, :]
    if rows_ptr is not None:
        fill_gaps(
            y_ptr, residual_ptr, rows_ptr, m, M, pid_n, N, N_out, stride_ym, stride_residual,
            BLOCK_N,
        )  # fmt: skip
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + m[:, None] * stride_residual + row[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + m[:, None] * stride_ym + row[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def gated_matmul_fwd(
    x: Tensor,
    weight: Weight,
    gates: Gates,
    out_features: int | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Launch the forward kernel on x [M, K_in]; sampled gates are written to their r and c.

    Returns:
        y [M, out_features] of x's dtype.
    """
    (m, _), (n, k) = x.shape, weight.w.shape
    rows, columns = weight.rows, weight.columns
    n_out = n if out_features is None else out_features
    x, gathered = gather_columns(x, columns)
    y = torch.empty(m, n_out, dtype=x.dtype, device=x.device)
    by_load = None if gathered else columns
    if not aligned((k, n if rows is None else 0), (x, by_load), (weight.w, None)):
        row = "fwd_odd"
    elif rows is None and by_load is None and residual is None and activation == "none":
        row = "fwd"
    else:
        row = "fwd_map"
    tile = gemm_tile(row, x, m, n, k)
    _gated_matmul_fwd_kernel[(cdiv(m, tile.m) * cdiv(n, tile.n),)](
        x, weight.w, weight.b, residual, y, gates.r, gates.c, *gates.logits, gates.seed,
        rows, columns, m, n, k, n_out, *x.stride(), *weight.w.stride(), n_out,
        0 if residual is None else residual.stride(0), *gates.scalars,
        ROW=gates.row, COLUMN=gates.column, ACTIVATION=activation, GATHERED=gathered,
        PRECISION=weight.precision, **gemm_options(tile),
    )  # fmt: skip
    return y
