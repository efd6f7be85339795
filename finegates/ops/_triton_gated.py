"""The gated Linear on Triton: gates inside the GEMM or folded into the weight, and the choice."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import dense, flat, kernels, on_its_device, precision, refusal, same_dtype
from .gated_call import GatedCall

# Rows of w that are never folded in 16 bit.
FEW_ROWS = 32


def why_not(
    x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None, c: Tensor | None
) -> str | None:
    """Return why `gated_linear` can't run on Triton, or None."""
    return refusal(x, w, b, r, c) or same_dtype(x, w, b)


@on_its_device
def gated_linear(
    x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None, c: Tensor | None
) -> Tensor:
    """Run the fused forward with given gate values."""
    weight = kernels().operands.Weight(w, dense(b), precision=precision(x))
    y: Tensor = kernels().fwd.gated_matmul_fwd(flat(x), weight, _given_gates(r, c))
    return y.view(*x.shape[:-1], w.shape[0])


def backward_why_not(dy: Tensor, x: Tensor, w: Tensor, b: Tensor | None, *_: Any) -> str | None:
    """Return why `gated_linear_backward` can't run on Triton, or None."""
    return refusal(x, dy, w, b) or same_dtype(x, dy, w, b)


@on_its_device
def gated_linear_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    r: Tensor | None,
    c: Tensor | None,
    y: Tensor,
    closed_row_grad: bool,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    """Run the backward kernels with given gate values; closed columns always get their gradient."""
    weight = kernels().operands.Weight(w, dense(b), precision=precision(x))
    return _gradients(dy, x, y, weight, _given_gates(r, c), mask, True, closed_row_grad)


def _given_gates(r: Tensor | None, c: Tensor | None) -> Any:
    """Return the kernels' gates with given values; every feature is its own unit."""
    return kernels().operands.Gates(
        row="none" if r is None else "value",
        column="none" if c is None else "value",
        r=dense(r),
        c=dense(c),
    )


def fused_why_not(call: GatedCall, dy: Tensor | None = None, *rest: Any) -> str | None:
    """Return why gates can't be inside the GEMM of a call or of its backward, or why not there."""
    return _call_why_not(call, dy) or _fold_wins(call, dy is not None, _trains_weight(rest))[0]


def fold_why_not(call: GatedCall, dy: Tensor | None = None, *rest: Any) -> str | None:
    """Return why a call or its backward can't fold its gates into the weight, or why not there."""
    return _call_why_not(call, dy) or _fold_wins(call, dy is not None, _trains_weight(rest))[1]


def _call_why_not(call: GatedCall, dy: Tensor | None) -> str | None:
    x, w, b = call.x, call.w, call.b
    reason = refusal(x, dy, w, b, out_features=call.out_features)
    return reason or same_dtype(x, dy, w, b)


def _trains_weight(rest: tuple[Any, ...]) -> bool:
    """Return whether a backward's (y, r, c, mask) wants dw."""
    return bool(rest) and rest[-1][1]


def _fold_wins(
    call: GatedCall, backward: bool, trains_weight: bool
) -> tuple[str | None, str | None]:
    """Return (why not fused, why not folded): exactly one of them is None.

    Forward and backward choose for themselves: either way of one fits either way of the other.
    """
    x, (n, k) = call.x, call.w.shape
    if call.rows is not None or call.columns is not None:
        return None, "the weight is compact or in another order"
    if call.closed_grad:
        return None, "closed gates get a gradient, which a folded weight has lost"
    if x.dtype.itemsize == 2 and n <= FEW_ROWS:
        return None, f"the roundings of {n} folded rows don't average out in columns' gradients"
    most = kernels().fold.MAX_FEATURES
    if n + k > most:
        return None, f"rows and columns are above the {most} of a folding kernel's grid"
    m = x.numel() // max(k, 1)
    family = kernels().launch.family(x.device) if x.is_cuda else "hopper"
    fused, folded = kernels().costs.estimate(
        m, n, k, x.dtype.itemsize, family, backward, trains_weight, call.seed is not None
    )
    times = f"{1e6 * fused:.1f} µs fused, {1e6 * folded:.1f} µs folded (estimate)"
    shape = f"at {m}×{n}×{k}"
    if folded < fused:
        return f"folding is faster {shape}: {times}", None
    return None, f"gates in the GEMM are faster {shape}: {times}"


@on_its_device
def gated_matmul_fused(call: GatedCall) -> tuple[Tensor, Tensor, Tensor]:
    """Sample and multiply in one launch; a compact weight's gates are all open: none to sample."""
    gates = kernels().operands.Gates() if call.compact else _sampled_gates(call)
    y = kernels().fwd.gated_matmul_fwd(flat(call.x), _weight(call), gates, call.out_features)
    return y.view(*call.x.shape[:-1], call.out_features), *_values(call, gates)


@on_its_device
def gated_matmul_fold(call: GatedCall) -> tuple[Tensor, Tensor, Tensor]:
    """Sample the gates into the weight in one launch, then let cuBLAS multiply."""
    gates = _sampled_gates(call)
    folded, bias = kernels().fold.fold_fwd(call.w, dense(call.b), gates)
    return F.linear(call.x, folded, bias), *_values(call, gates)


def _weight(call: GatedCall) -> Any:
    vectors = (dense(call.b), dense(call.rows), dense(call.columns))
    return kernels().operands.Weight(call.w, *vectors, precision(call.x))


def _sampled_gates(call: GatedCall) -> Any:
    """Return the kernels' gates with room for the values that they sample."""
    return _gates(
        call,
        None if call.row_logits is None else call.row_logits.new_empty(call.out_features),
        None if call.column_logits is None else call.column_logits.new_empty(call.in_features),
    )


def _gates(call: GatedCall, r: Tensor | None, c: Tensor | None) -> Any:
    distribution, *constants = call.law
    return kernels().operands.Gates(
        "none" if call.row_logits is None else distribution,
        "none" if call.column_logits is None else distribution,
        dense(r),
        dense(c),
        dense(call.row_logits),
        dense(call.column_logits),
        None if distribution == "ranking" else dense(call.seed),
        tuple(call.row_layout),
        tuple(call.column_layout),
        *constants,
    )


def _values(call: GatedCall, gates: Any) -> tuple[Tensor, Tensor]:
    """Return r and c, empty where there are none; one tensor each: outputs may not alias."""
    r, c = (
        call.x.new_empty(0, dtype=torch.float32) if z is None else z for z in (gates.r, gates.c)
    )
    return r, c


@on_its_device
def gated_matmul_backward_fused(
    call: GatedCall, dy: Tensor, y: Tensor, r: Tensor, c: Tensor, mask: list[bool]
) -> tuple[Tensor, ...]:
    """Run the backward kernels: two launches with a frozen weight, three with a trained one."""
    compact = call.compact
    gates = _gates(call, None, None) if compact else _drawn_gates(call, r, c)
    return _gradients(
        dy, call.x, y, _weight(call), gates, mask, call.closed_grad or compact, call.closed_grad
    )


def _drawn_gates(call: GatedCall, r: Tensor, c: Tensor) -> Any:
    """Return the kernels' gates with the values that the forward drew."""
    return _gates(
        call, None if call.row_logits is None else r, None if call.column_logits is None else c
    )


@on_its_device
def gated_matmul_backward_fold(
    call: GatedCall, dy: Tensor, y: Tensor, r: Tensor, c: Tensor, mask: list[bool]
) -> tuple[Tensor, ...]:
    """Fold again, dx = dy w', and dc = Σ x ⊙ dx / c beside dr = Σ dy ⊙ y / r for interior gates."""
    fold, weight, gates = kernels().fold, _weight(call), _drawn_gates(call, r, c)
    given = _given_gates(gates.r, gates.c)
    wants_column = mask[4] and gates.c is not None
    dy2, x2, y2 = flat(dy), flat(call.x), flat(y).contiguous()
    dx = dw = None
    if mask[0] or wants_column:
        folded, _ = fold.fold_fwd(call.w, None, given)
        dx = dy2 @ folded
    if mask[1]:
        dw, _ = fold.fold_fwd(dy2.t() @ x2, None, given)
    wanted = (mask[3] and gates.r is not None, wants_column, mask[2] and call.b is not None)
    dr, dc, db = fold.fold_bwd(dy2, y2, x2, dx, wanted)
    drow, dcolumn, dbias = kernels().bwd.gated_matmul_bwd_gates(
        dr, dc, db, weight, gates, divide_row=True, divide_column=True
    )
    dx = dx.view(call.x.shape) if dx is not None and mask[0] else None
    return _filled((dx, dw, dbias, drow, dcolumn), call.x)


def _gradients(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Any,
    gates: Any,
    mask: list[bool],
    closed_grad: bool,
    closed_row_grad: bool,
) -> tuple[Tensor, ...]:
    """dx, dw, db and both sides' gradients, by the fewest kernels that give what is wanted."""
    bwd = kernels().bwd
    wants_row = mask[3] and gates.row != "none"
    wants_column = mask[4] and gates.column != "none"
    wants_bias = mask[2] and weight.b is not None
    dy2, x2 = flat(dy), flat(x)
    y2 = flat(y).contiguous() if wants_row else dy2  # nobody else reads it
    dx = dw = None
    if mask[1]:
        if mask[0]:
            only_dx = (True, False, False, False)
            dx, *_ = bwd.gated_matmul_bwd_x(dy2, x2, y2, weight, gates, only_dx)
        dw, dc, dr, db = bwd.gated_matmul_bwd_w(
            dy2, x2, weight, gates, (wants_column, wants_row, wants_bias), closed_grad
        )
    else:
        dx, dc, dr, db = bwd.gated_matmul_bwd_x(
            dy2, x2, y2, weight, gates, (mask[0], wants_column, wants_row, wants_bias), closed_grad
        )
        if wants_row and closed_row_grad:
            bwd.gated_matmul_bwd_r(dy2, x2, dr, weight, gates)
    drow, dcolumn, dbias = bwd.gated_matmul_bwd_gates(
        dr, dc, db, weight, gates, not mask[1], False, closed_grad, closed_row_grad
    )
    dx = None if dx is None else dx.view(x.shape)
    return _filled((dx, dw, dbias, drow, dcolumn), x)


def _filled(grads: tuple[Tensor | None, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Replace what was not wanted by empty tensors, one each: outputs of an op may not alias."""
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)
