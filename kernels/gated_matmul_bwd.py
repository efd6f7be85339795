"""The gated Linear's backward kernels: to x and both gates, to w, and the sums' second stage.

Letters and index maps as in gated_matmul.py. First-stage sums have a row per tile; the second stage
adds them in the order of the tiles, so that two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gate import feature_of, fill_gaps, fill_gate, gate_derivative, tile_count, tile_order
from .gated_matmul import gated_dot
from .launch import OPTIONS, REDUCE, Tile, aligned, cdiv, gemm_options, gemm_tile
from .norm_gather import gather_columns
from .operands import Gates, Weight


@triton.jit
def _sum_dy(
    dy_ptr, y_ptr, rows_ptr, dr_ptr, db_ptr, m, M, N, N_out, tile_m, first, step,
    stride_dym, stride_dyn, stride_ym, GATHERED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Σₘ dy ⊙ y and Σₘ dy over one row tile, for every ``step``-th block of rows of w.

    The column tiles of the row tile share the blocks out, so that dy comes from L2 and none of
    them does more than its part.
    """
    for tile in range(first, tl.cdiv(N, BLOCK_N), step):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        row = feature_of(rows_ptr, n, n < N)
        mask = (m < M)[:, None] & (n < N)[None, :]
        at = n if GATHERED else row
        dy_ptrs = dy_ptr + m[:, None] * stride_dym + at[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        if db_ptr is not None:
            tl.store(db_ptr + tile_m * N + n, tl.sum(dy, 0), mask=n < N)
        if dr_ptr is not None:
            y_ptrs = y_ptr + m[:, None] * stride_ym + row[None, :]
            y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
            tl.store(dr_ptr + tile_m * N_out + row, tl.sum(dy * y, 0), mask=n < N)


@triton.jit
def _gated_matmul_bwd_x_kernel(
    dy_ptr, w_ptr, x_ptr, y_ptr, r_ptr, c_ptr, rows_ptr, columns_ptr,
    dx_ptr, dc_ptr, dr_ptr, db_ptr, M, N, K, N_out, K_in,
    stride_dym, stride_dyn, stride_wn, stride_wk, stride_xm, stride_xk, stride_ym,
    CLOSED_GRAD: tl.constexpr, GATHERED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """u = (dy ⊙ r) w, dx = u ⊙ c, and per row tile the sums over m of x ⊙ u, dy ⊙ y and dy.

    dc_ptr [tiles, K_in], dr_ptr [tiles, N_out] and db_ptr [tiles, N] are first-stage sums that
    `_gated_matmul_bwd_gates_kernel` adds in a fixed order. With ``GATHERED`` dy has w's rows only,
    side by side, while y has all.
    """
    tiles_k = tile_count(K, BLOCK_K)
    pid_m, pid_k = tile_order(tl.program_id(0), tile_count(M, BLOCK_M), tiles_k, GROUP_M)
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = feature_of(columns_ptr, k, k < K)
    end = N
    if r_ptr is not None:
        end = fill_gate(r_ptr, None, None, rows_ptr, N, 1, 1, 0.0, 1.0, 1.0, "value", 0)
    if c_ptr is not None:
        c = tl.load(c_ptr + column, mask=k < K, other=0.0)
        if not CLOSED_GRAD:
            end = tl.where(tl.max((c != 0.0).to(tl.int32)) > 0, end, 0)
    if dx_ptr is None and dc_ptr is None:  # only sums over dy and y are wanted
        end = 0
    u = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    dy_ptrs = dy_ptr + m[:, None] * stride_dym
    w_ptrs = w_ptr + n[:, None] * stride_wn + k[None, :] * stride_wk
    for start in range(0, end, BLOCK_N):
        inside = n < N - start
        row = start + n
        if r_ptr is not None or not GATHERED:
            row = feature_of(rows_ptr, row, inside)
        dy_mask = (m < M)[:, None] & inside[None, :]
        at = start + n if GATHERED else row
        dy = tl.load(dy_ptrs + at[None, :] * stride_dyn, mask=dy_mask, other=0.0)
        w = tl.load(w_ptrs, mask=inside[:, None] & (k < K)[None, :], other=0.0)
        if r_ptr is not None:
            r = tl.load(r_ptr + row, mask=inside, other=0.0)
            dy = dy * r.to(dy.dtype)[None, :]
        u = tl.dot(dy, w, u, input_precision=PRECISION)
        w_ptrs += tl.full((), BLOCK_N, tl.int64) * stride_wn

    mask = (m < M)[:, None] & (k < K)[None, :]
    if dc_ptr is not None:
        # Without a step of the loop u is 0, and x need not be loaded.
        x_mask = (m < tl.where(end > 0, M, 0))[:, None] & (k < K)[None, :]
        x_ptrs = x_ptr + m[:, None] * stride_xm + column[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=x_mask, other=0.0).to(tl.float32)
        tl.store(dc_ptr + pid_m.to(tl.int64) * K_in + column, tl.sum(x * u, 0), mask=k < K)
    if dx_ptr is not None:
        if c_ptr is not None:
            u *= c[None, :]
        if columns_ptr is not None:
            fill_gaps(dx_ptr, None, columns_ptr, m, M, pid_k, K, K_in, K_in, 0, BLOCK_K)
        dx_ptrs = dx_ptr + m[:, None] * K_in + column[None, :]
        tl.store(dx_ptrs, u.to(dx_ptr.dtype.element_ty), mask=mask)
    if dr_ptr is not None or db_ptr is not None:
        _sum_dy(
            dy_ptr, y_ptr, rows_ptr, dr_ptr, db_ptr, m, M, N, N_out, pid_m.to(tl.int64), pid_k,
            tiles_k, stride_dym, stride_dyn, stride_ym, GATHERED, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _gated_matmul_bwd_r_kernel(
    x_ptr, w_ptr, b_ptr, dy_ptr, r_ptr, c_ptr, rows_ptr, columns_ptr, dr_ptr, M, N, K, N_out,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_dym, stride_dyn,
    GATHERED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """First-stage Σ dy ⊙ ((x ⊙ c) wᵀ + b) of the closed rows, whose y has lost it.

    Tiles without a closed row load nothing; entries of open rows are left as they are.
    """
    tiles_n = tile_count(N, BLOCK_N)
    pid_m, pid_n = tile_order(tl.program_id(0), tile_count(M, BLOCK_M), tiles_n, GROUP_M)
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = feature_of(rows_ptr, n, n < N)
    closed = (n < N) & (tl.load(r_ptr + row, mask=n < N, other=1.0) == 0.0)
    end = K
    if c_ptr is not None:
        end = fill_gate(c_ptr, None, None, columns_ptr, K, 1, 1, 0.0, 1.0, 1.0, "value", 1)
    if tl.max(closed.to(tl.int32)) > 0:
        acc = gated_dot(
            x_ptr, w_ptr, c_ptr, columns_ptr, m, n, end, M, N, K,
            stride_xm, stride_xk, stride_wn, stride_wk, GATHERED, PRECISION, BLOCK_M, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
        if b_ptr is not None:
            acc += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        dy_ptrs = dy_ptr + m[:, None] * stride_dym + row[None, :] * stride_dyn
        # Whole rows of the tile, in loads of 16 bytes: those of the closed ones alone are of 2.
        dy = tl.load(dy_ptrs, mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
        dr = tl.sum(dy.to(tl.float32) * acc, 0)
        tl.store(dr_ptr + pid_m.to(tl.int64) * N_out + row, dr, mask=closed)


@triton.jit
def _sum_dy_rows(
    dy_ptr, n, N, M, first, step, stride_dym, stride_dyn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Σ dy over every ``step``-th block of m: the column tiles of a row tile share it out."""
    total = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(first, tl.cdiv(M, BLOCK_M), step):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        dy_ptrs = dy_ptr + m[None, :] * stride_dym + n[:, None] * stride_dyn
        dy = tl.load(dy_ptrs, mask=(n < N)[:, None] & (m < M)[None, :], other=0.0)
        total += tl.sum(dy.to(tl.float32), 1)
    return total


@triton.jit
def _gated_matmul_bwd_w_kernel(
    dy_ptr, x_ptr, w_ptr, b_ptr, r_ptr, c_ptr, rows_ptr, columns_ptr,
    dw_ptr, dc_ptr, dr_ptr, db_ptr, M, N, K, N_out, K_in,
    stride_dym, stride_dyn, stride_xm, stride_xk, stride_wn, stride_wk,
    CLOSED_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """G = dyᵀ x, dw = (r cᵀ) ⊙ G, and the first-stage sums of dr, dc and db from the same tile.

    dy [M, N] and x [M, K] have the kept rows and columns only, side by side.
    dr = Σₖ w ⊙ c ⊙ G + b Σ dy to dr_ptr [tiles of K, N_out], dc = Σₙ w ⊙ r ⊙ G to dc_ptr
    [tiles of N, K_in], Σ dy to db_ptr [tiles of K, N].
    """
    tiles_k = tile_count(K, BLOCK_K)
    pid_n, pid_k = tile_order(tl.program_id(0), tile_count(N, BLOCK_N), tiles_k, GROUP_M)
    n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = feature_of(rows_ptr, n, n < N)
    column = feature_of(columns_ptr, k, k < K)
    end = M
    r = (n < N).to(tl.float32)
    c = (k < K).to(tl.float32)
    if r_ptr is not None:
        r = tl.load(r_ptr + row, mask=n < N, other=0.0)
    if c_ptr is not None:
        c = tl.load(c_ptr + column, mask=k < K, other=0.0)
    if not CLOSED_GRAD:
        # A tile that is closed on one side has dw = 0 and no dr or dc that is wanted.
        row_open = tl.max((r != 0.0).to(tl.int32)) > 0
        column_open = tl.max((c != 0.0).to(tl.int32)) > 0
        end = tl.where(row_open & column_open, end, 0)
    g = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    m = tl.arange(0, BLOCK_M).to(tl.int64)
    dy_ptrs = dy_ptr + m[None, :] * stride_dym + n[:, None] * stride_dyn
    x_ptrs = x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk
    for start in range(0, end, BLOCK_M):
        inside = m < M - start
        dy = tl.load(dy_ptrs, mask=(n < N)[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=inside[:, None] & (k < K)[None, :], other=0.0)
        g = tl.dot(dy, x, g, input_precision=PRECISION)
        dy_ptrs += tl.full((), BLOCK_M, tl.int64) * stride_dym
        x_ptrs += tl.full((), BLOCK_M, tl.int64) * stride_xm

    mask = (n < N)[:, None] & (k < K)[None, :]
    w_offsets = n[:, None] * stride_wn + k[None, :] * stride_wk
    if dr_ptr is not None or dc_ptr is not None:
        wg = tl.load(w_ptr + w_offsets, mask=mask, other=0.0).to(tl.float32) * g
        if dc_ptr is not None:
            dc = tl.sum(wg * r[:, None], 0)
            tl.store(dc_ptr + pid_n.to(tl.int64) * K_in + column, dc, mask=k < K)
    if dr_ptr is not None or db_ptr is not None:
        total = _sum_dy_rows(
            dy_ptr, n, N, M, pid_k, tiles_k, stride_dym, stride_dyn, BLOCK_M, BLOCK_N
        )
        if db_ptr is not None:
            tl.store(db_ptr + pid_k.to(tl.int64) * N + n, total, mask=n < N)
        if dr_ptr is not None:
            dr = tl.sum(wg * c[None, :], 1)
            if b_ptr is not None:
                dr += total * tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)
            tl.store(dr_ptr + pid_k.to(tl.int64) * N_out + row, dr, mask=n < N)
    dw = g * r[:, None] * c[None, :]
    dw_ptrs = dw_ptr + n[:, None] * K + k[None, :]
    tl.store(dw_ptrs, dw.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _column_sum(partial_ptr, index, mask, size, tiles, BLOCK_T: tl.constexpr):
    """Return Σ over the first-stage tiles, in the order of the tiles."""
    total = tl.zeros(index.shape, tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        partial_ptrs = partial_ptr + t[:, None] * size + index[None, :]
        live = (t < tiles)[:, None] & mask[None, :]
        total += tl.sum(tl.load(partial_ptrs, mask=live, other=0.0), 0)
    return total


@triton.jit
def _gate_gradient(
    block, partial_ptr, value_ptr, logits_ptr, out_ptr, size, units, tiles, span, width,
    shift, scale, beta, DISTRIBUTION: tl.constexpr, NOISE: tl.constexpr,
    CLOSED_GRAD: tl.constexpr, DIVIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dθ of one block of units: Σ over members and tiles of dz (÷ z if ``DIVIDE``) times dz/dθ."""
    unit = block * BLOCK + tl.arange(0, BLOCK)
    mask = unit < units
    gradient = tl.zeros((BLOCK,), tl.float32)
    for member in range(span // width):
        index = (unit // width) * span + member * width + unit % width
        d = _column_sum(partial_ptr, index, mask, size, tiles, BLOCK_T)
        if value_ptr is None:
            z = tl.full((BLOCK,), 1.0, tl.float32)
        else:
            z = tl.load(value_ptr + index, mask=mask, other=1.0).to(tl.float32)
        if DIVIDE:
            d = d / tl.where(z == 0.0, 1.0, z)
        if DISTRIBUTION == "value":
            if not CLOSED_GRAD:
                d = tl.where(z == 0.0, 0.0, d)
        else:
            theta = tl.load(logits_ptr + unit, mask=mask, other=0.0)
            slope = gate_derivative(z, theta, shift, scale, beta, DISTRIBUTION, NOISE, CLOSED_GRAD)
            d = tl.where(slope == 0.0, 0.0, d * slope)  # a clamped gate passes no NaN on
        gradient += d
    tl.store(out_ptr + unit, gradient.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_matmul_bwd_gates_kernel(
    dr_ptr, dc_ptr, db_ptr, r_ptr, c_ptr, rows_ptr, row_logits_ptr, column_logits_ptr,
    row_out_ptr, column_out_ptr, bias_out_ptr,
    N, N_out, K_in, row_units, column_units, row_tiles, column_tiles,
    row_span, row_width, column_span, column_width, shift, scale, beta,
    DISTRIBUTION: tl.constexpr, NOISE: tl.constexpr, CLOSED_GRAD: tl.constexpr,
    CLOSED_ROW_GRAD: tl.constexpr, DIVIDE_ROW: tl.constexpr, DIVIDE_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Second stage: the blocks of column units, then of row units, then of biases."""
    block = tl.program_id(0)
    if column_out_ptr is not None:
        if block * BLOCK < column_units:
            _gate_gradient(
                block, dc_ptr, c_ptr, column_logits_ptr, column_out_ptr, K_in, column_units,
                column_tiles, column_span, column_width, shift, scale, beta,
                DISTRIBUTION, NOISE, CLOSED_GRAD, DIVIDE_COLUMN, BLOCK, BLOCK_T,
            )  # fmt: skip
        block -= tl.cdiv(column_units, BLOCK)
    if row_out_ptr is not None:
        if (block >= 0) & (block * BLOCK < row_units):
            _gate_gradient(
                block, dr_ptr, r_ptr, row_logits_ptr, row_out_ptr, N_out, row_units,
                row_tiles, row_span, row_width, shift, scale, beta,
                DISTRIBUTION, NOISE, CLOSED_ROW_GRAD, DIVIDE_ROW, BLOCK, BLOCK_T,
            )  # fmt: skip
        block -= tl.cdiv(row_units, BLOCK)
    if bias_out_ptr is not None:  # noqa: SIM102, Triton would build both sides of an "and"
        if (block >= 0) & (block * BLOCK < N):
            n = block * BLOCK + tl.arange(0, BLOCK)
            db = _column_sum(db_ptr, n, n < N, N, row_tiles, BLOCK_T)
            if r_ptr is not None:
                row = feature_of(rows_ptr, n, n < N)
                db *= tl.load(r_ptr + row, mask=n < N, other=0.0)
            tl.store(bias_out_ptr + n, db.to(bias_out_ptr.dtype.element_ty), mask=n < N)


def gated_matmul_bwd_x(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Weight,
    gates: Gates,
    wanted: tuple[bool, bool, bool, bool],
    closed_grad: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Launch `_gated_matmul_bwd_x_kernel` on dy, y [M, N_out] and x [M, K_in].

    Args:
        wanted: which of dx and the first-stage sums of dc, dr and db to compute.

    Returns:
        dx [M, K_in] and the sums [tiles, K_in], [tiles, N_out], [tiles, N]; None if not wanted.
    """
    (m, n_out), (n, k), k_in = dy.shape, weight.w.shape, x.shape[1]
    rows, columns = weight.rows, weight.columns
    tile = _bwd_x_tile(dy, x, weight)
    dy, gathered = gather_columns(dy, rows)
    tiles = cdiv(m, tile.m)
    dx = torch.empty(m, k_in, dtype=x.dtype, device=x.device) if wanted[0] else None
    dc = _partial(x, tiles, k_in, columns) if wanted[1] else None
    dr = _partial(x, tiles, n_out, rows) if wanted[2] else None
    db = _partial(x, tiles, n, None) if wanted[3] else None
    _gated_matmul_bwd_x_kernel[(tiles * cdiv(k, tile.k),)](
        dy, weight.w, x, y, gates.r, gates.c, rows, columns, dx, dc, dr, db, m, n, k, n_out, k_in,
        *dy.stride(), *weight.w.stride(), *x.stride(), y.stride(0),
        CLOSED_GRAD=closed_grad, GATHERED=gathered, PRECISION=weight.precision,
        **gemm_options(tile),
    )  # fmt: skip
    return dx, dc, dr, db


def gated_matmul_bwd_r(dy: Tensor, x: Tensor, dr: Tensor, weight: Weight, gates: Gates) -> None:
    """Write the closed rows' first-stage sums into ``dr``, of `gated_matmul_bwd_x`'s row tiles."""
    (m, n_out), (n, k) = dy.shape, weight.w.shape
    tile = bwd_r_tile(_bwd_x_tile(dy, x, weight))
    x, gathered = gather_columns(x, weight.columns)
    if dr.shape[0] != cdiv(m, tile.m):
        raise ValueError(f"dr must have {cdiv(m, tile.m)} tiles, got {dr.shape[0]}")
    _gated_matmul_bwd_r_kernel[(cdiv(m, tile.m) * cdiv(n, tile.n),)](
        x, weight.w, weight.b, dy, gates.r, gates.c, weight.rows, weight.columns, dr,
        m, n, k, n_out, *x.stride(), *weight.w.stride(), *dy.stride(),
        GATHERED=gathered, PRECISION=weight.precision, **gemm_options(tile),
    )  # fmt: skip


def _bwd_x_tile(dy: Tensor, x: Tensor, weight: Weight) -> Tile:
    n, k = weight.w.shape
    matrices = ((dy, weight.rows), (x, weight.columns), (weight.w, None))
    if not aligned((n, k), *matrices):
        row = "bwd_x_odd"
    else:
        row = "bwd_x_map" if weight.mapped else "bwd_x"
    return gemm_tile(row, x, x.shape[0], n, k)


def bwd_r_tile(tile: Tile) -> Tile:
    """Return the closed-row kernel's tile: dx's row tiles, up to 64 rows of w, short steps."""
    return tile._replace(n=min(tile.m, 64), k=32)


def gated_matmul_bwd_w(
    dy: Tensor,
    x: Tensor,
    weight: Weight,
    gates: Gates,
    wanted: tuple[bool, bool, bool],
    closed_grad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Launch `_gated_matmul_bwd_w_kernel`; ``wanted`` asks for the sums of dc, dr and db.

    Returns:
        dw [N, K] of w's dtype, the sums [tiles of N, K_in], [tiles of K, N_out], [tiles of K, N].
    """
    (m, n_out), (n, k), k_in = dy.shape, weight.w.shape, x.shape[1]
    rows, columns = weight.rows, weight.columns
    dy, _ = gather_columns(dy, rows, always=True)
    x, _ = gather_columns(x, columns, always=True)
    whole = aligned((n, k), (dy, None), (x, None), (weight.w, None))
    tile = gemm_tile("bwd_w" if whole else "bwd_w_odd", x, m, n, k)
    tiles_n, tiles_k = cdiv(n, tile.n), cdiv(k, tile.k)
    dw = torch.empty(n, k, dtype=x.dtype, device=x.device)
    dc = _partial(x, tiles_n, k_in, columns) if wanted[0] else None
    dr = _partial(x, tiles_k, n_out, rows) if wanted[1] else None
    db = _partial(x, tiles_k, n, None) if wanted[2] else None
    _gated_matmul_bwd_w_kernel[(tiles_n * tiles_k,)](
        dy, x, weight.w, weight.b, gates.r, gates.c, rows, columns, dw, dc, dr, db,
        m, n, k, n_out, k_in, *dy.stride(), *x.stride(), *weight.w.stride(),
        CLOSED_GRAD=closed_grad, PRECISION=weight.precision, **gemm_options(tile),
    )  # fmt: skip
    return dw, dc, dr, db


def gated_matmul_bwd_gates(
    dr: Tensor | None,
    dc: Tensor | None,
    db: Tensor | None,
    weight: Weight,
    gates: Gates,
    divide_row: bool,
    divide_column: bool = False,
    closed_grad: bool = False,
    closed_row_grad: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Add the first-stage sums in order and apply dz/dθ: one launch for both gates and the bias.

    Args:
        divide_row, divide_column: the sums are of dy ⊙ y, or of x ⊙ dx, and still carry the gate.
        closed_grad, closed_row_grad: whether closed columns, and closed rows, get a gradient.

    Returns:
        The gradients to the row side and to the column side (fp32; to logits [units], or to values
        [N_out], [K_in] in their dtype) and to the bias; None where there is no sum.
    """
    row_out = _gradient_like(dr, gates.r, gates.row_logits)
    column_out = _gradient_like(dc, gates.c, gates.column_logits)
    bias_out = None if db is None or weight.b is None else torch.empty_like(weight.b)
    sizes = [0 if out is None else out.shape[0] for out in (row_out, column_out, bias_out)]
    blocks = sum(cdiv(size, REDUCE["BLOCK"]) for size in sizes if size)
    row_sums = dr if dr is not None else db
    distribution = gates.row if gates.row != "none" else gates.column
    if blocks:
        _gated_matmul_bwd_gates_kernel[(blocks,)](
            dr, dc, db, gates.r, gates.c, weight.rows, *gates.logits,
            row_out, column_out, bias_out,
            sizes[2], 0 if dr is None else dr.shape[1], 0 if dc is None else dc.shape[1],
            sizes[0], sizes[1], 0 if row_sums is None else row_sums.shape[0],
            0 if dc is None else dc.shape[0], *gates.scalars,
            DISTRIBUTION=distribution, NOISE=gates.seed is not None, CLOSED_GRAD=closed_grad,
            CLOSED_ROW_GRAD=closed_row_grad, DIVIDE_ROW=divide_row, DIVIDE_COLUMN=divide_column,
            **REDUCE, **OPTIONS,
        )  # fmt: skip
    return row_out, column_out, bias_out


def _partial(x: Tensor, tiles: int, size: int, index_map: Tensor | None) -> Tensor:
    """Return room for first-stage sums; with an index map some features get none and stay 0."""
    make = torch.empty if index_map is None else torch.zeros
    return make(tiles, size, dtype=torch.float32, device=x.device)


def _gradient_like(
    sums: Tensor | None, values: Tensor | None, logits: Tensor | None
) -> Tensor | None:
    target = values if logits is None else logits
    return None if sums is None or target is None else torch.empty_like(target)
