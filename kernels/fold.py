"""Fold sampled gates into the weight, w' = (r cᵀ) ⊙ w and b' = r ⊙ b, and leave the GEMM to cuBLAS.

One pass over w instead of gates inside the GEMM: the right choice where Triton's GEMM is far below
cuBLAS (small layers) or w is small beside x and y (many tokens).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gate import gate_tile, tile_count
from .launch import OPTIONS, STREAM, STREAM_ODD, SUMS, SUMS_ODD, aligned, cdiv
from .operands import Gates

# Blocks of features are the second dimension of both grids, of which CUDA allows 65,535.
MAX_FEATURES = 65_535 * min(STREAM_ODD["BLOCK"], SUMS_ODD["BLOCK"])


@triton.jit
def _fold_fwd_kernel(
    w_ptr, b_ptr, w_out_ptr, b_out_ptr, r_ptr, c_ptr, row_logits_ptr, column_logits_ptr, seed_ptr,
    N, K, stride_wn, stride_wk, row_span, row_width, column_span, column_width, shift, scale, beta,
    ROW: tl.constexpr, COLUMN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid_n, pid_k = tl.program_id(0), tl.program_id(1)
    n = pid_n.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid_k.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    r = gate_tile(
        r_ptr, row_logits_ptr, seed_ptr, n.to(tl.int32), n < N, row_span, row_width,
        shift, scale, beta, ROW, 0,
    )  # fmt: skip
    c = gate_tile(
        c_ptr, column_logits_ptr, seed_ptr, k.to(tl.int32), k < K, column_span, column_width,
        shift, scale, beta, COLUMN, 1,
    )  # fmt: skip
    if (ROW != "none") & (ROW != "value"):
        tl.store(r_ptr + n, r, mask=n < tl.where(pid_k == 0, N, 0))
    if (COLUMN != "none") & (COLUMN != "value"):
        tl.store(c_ptr + k, c, mask=k < tl.where(pid_n == 0, K, 0))
    # A closed row is not loaded. Columns share their 16-byte loads, so that a closed one is.
    mask = (n < N)[:, None] & (k < K)[None, :]
    live = mask & (r != 0.0)[:, None]
    w_ptrs = w_ptr + n[:, None] * stride_wn + k[None, :] * stride_wk
    w = tl.load(w_ptrs, mask=live, other=0.0).to(tl.float32) * r[:, None] * c[None, :]
    tl.store(w_out_ptr + n[:, None] * K + k[None, :], w.to(w_out_ptr.dtype.element_ty), mask=mask)
    if b_ptr is not None:
        first = n < tl.where(pid_k == 0, N, 0)
        b = tl.load(b_ptr + n, mask=first, other=0.0).to(tl.float32) * r
        tl.store(b_out_ptr + n, b.to(b_out_ptr.dtype.element_ty), mask=first)


@triton.jit
def _stream_sums(
    a_ptr, b_ptr, product_ptr, total_ptr, tile_m, tile, M, N, stride_am, stride_an, stride_bm,
    BLOCK_M: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σₘ a ⊙ b and Σₘ a of one tile, to the first-stage sums [tiles, N]."""
    n = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    product = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        m = (tile_m * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (m < M)[:, None] & (n < N)[None, :]
        a = tl.load(a_ptr + m[:, None] * stride_am + n[None, :] * stride_an, mask=mask, other=0.0)
        a = a.to(tl.float32)
        total += tl.sum(a, 0)
        if product_ptr is not None:
            b = tl.load(b_ptr + m[:, None] * stride_bm + n[None, :], mask=mask, other=0.0)
            product += tl.sum(a * b.to(tl.float32), 0)
    if product_ptr is not None:
        tl.store(product_ptr + tile_m * N + n, product, mask=n < N)
    if total_ptr is not None:
        tl.store(total_ptr + tile_m * N + n, total, mask=n < N)


@triton.jit
def _fold_bwd_kernel(
    dy_ptr, y_ptr, x_ptr, dx_ptr, dr_ptr, dc_ptr, db_ptr, M, N, K,
    stride_dym, stride_dyn, stride_ym, stride_xm, stride_xk, stride_dxm,
    BLOCK_M: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First-stage Σₘ dy ⊙ y, Σₘ dy and Σₘ x ⊙ dx: blocks of N first, then blocks of K."""
    tile_m = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    tiles_n = tile_count(N, BLOCK)
    if tile < tiles_n:
        _stream_sums(
            dy_ptr, y_ptr, dr_ptr, db_ptr, tile_m, tile, M, N,
            stride_dym, stride_dyn, stride_ym, BLOCK_M, STEPS, BLOCK,
        )  # fmt: skip
    elif dc_ptr is not None:
        _stream_sums(
            x_ptr, dx_ptr, dc_ptr, None, tile_m, tile - tiles_n, M, K,
            stride_xm, stride_xk, stride_dxm, BLOCK_M, STEPS, BLOCK,
        )  # fmt: skip


def fold_fwd(w: Tensor, b: Tensor | None, gates: Gates) -> tuple[Tensor, Tensor | None]:
    """Launch the fold of w [N, K] and b [N]; sampled gates are written to their r and c.

    Returns:
        w' and b', contiguous, of w's dtype.
    """
    n, k = w.shape
    w_out = torch.empty(n, k, dtype=w.dtype, device=w.device)
    b_out = None if b is None else torch.empty_like(b)
    launch = STREAM if aligned((n, k), (w, None)) else STREAM_ODD
    _fold_fwd_kernel[(cdiv(n, launch["BLOCK_M"]), cdiv(k, launch["BLOCK"]))](
        w, b, w_out, b_out, gates.r, gates.c, *gates.logits, gates.seed,
        n, k, *w.stride(), *gates.scalars, ROW=gates.row, COLUMN=gates.column, **launch, **OPTIONS,
    )  # fmt: skip
    return w_out, b_out


def fold_bwd(
    dy: Tensor, y: Tensor, x: Tensor, dx: Tensor | None, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the sums of dy ⊙ y, x ⊙ dx and dy over m; ``wanted`` asks for dr, dc and db.

    Returns:
        First-stage sums [tiles, N], [tiles, K], [tiles, N] in fp32; None if not wanted.
    """
    (m, n), k = dy.shape, x.shape[1]
    tiles = cdiv(m, SUMS["BLOCK_M"] * SUMS["STEPS"])
    sums = [
        torch.empty(tiles, size, dtype=torch.float32, device=x.device) if want else None
        for want, size in zip(wanted, (n, k, n), strict=True)
    ]
    launch = SUMS if aligned((n, k), (dy, None), (x, None)) else SUMS_ODD
    blocks = cdiv(n, launch["BLOCK"]) + (cdiv(k, launch["BLOCK"]) if wanted[1] else 0)
    _fold_bwd_kernel[(tiles, blocks)](
        dy, y, x, dx, *sums, m, n, k, *dy.stride(), y.stride(0), *x.stride(),
        0 if dx is None else dx.stride(0), **launch, **OPTIONS,
    )  # fmt: skip
    return sums[0], sums[1], sums[2]
