"""`gated_matmul` on the CPU kernels, for a weight whose every row and column is open.

Such a call is a pruned Linear, and so is its gradient dx[..., columns] = dy[..., rows] w: the same
kernel with w transposed and the kept sides swapped. Both weights are packed at each call, since a
training step comes between two of them; that is about 3 % of a product with 2,048 tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _cpu, reference
from .gated_call import GatedCall


def why_not(call: GatedCall, *_: object) -> str | None:
    """Return in one line why the CPU kernels cannot serve a call or its backward, or None."""
    if call.distribution != "ranking":
        return f"{call.distribution} gates are not binary"
    reason = _cpu.why_not(call.x, call.w)
    if reason is not None or call.compact:
        return reason
    if call.rows is not None or call.columns is not None:
        return "the weight is in another order"
    for logits in (call.row_logits, call.column_logits):
        if logits is not None and not bool((logits > 0).all()):
            return "a gate is closed and its weight not removed"
    return None


def gated_matmul(call: GatedCall) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.gated_matmul` where every gate of the held weight is open."""
    weight, bias = call.w.resolve_neg(), None if call.b is None else call.b.resolve_neg()
    packed = _cpu.prepare(
        weight, bias, call.rows, call.columns, call.out_features, call.in_features
    )
    y = _cpu.pruned_linear(call.x, packed, call.out_features)
    sides = ((call.row_logits, call.out_features), (call.column_logits, call.in_features))
    r, c = (torch.ones(0 if logits is None or call.compact else size) for logits, size in sides)
    return y, r, c


def gated_matmul_backward(
    call: GatedCall, dy: Tensor, y: Tensor, r: Tensor, c: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.gated_matmul_backward` of such a call.

    y, dy and x need no gather for the gates: y is 0 in closed rows and dx in closed columns.
    """
    x, w, b, row_logits, column_logits, _, rows, columns = call[:8]
    # One tensor each: outputs of an op may not alias.
    dx, dw, db, dr, dc = (x.new_empty(0) for _ in range(5))
    tokens = math.prod(x.shape[:-1])
    x2, dy2, y2 = (t.reshape(tokens, t.shape[-1]) for t in (x, dy, y))
    if mask[0] or mask[4]:
        transposed = w.resolve_neg().t()
        packed = _cpu.prepare(transposed, None, columns, rows, call.in_features, call.out_features)
        dx = _cpu.pruned_linear(dy, packed, call.in_features)
        if mask[4] and column_logits is not None:
            dc = (x2 * dx.view_as(x2)).sum(0)
            dc = _to_logits(dc, column_logits, call.column_layout, call)
        if not mask[0]:
            dx = x.new_empty(0)
    if mask[1]:
        kept_dy = dy2 if rows is None else dy2.index_select(1, rows)
        kept_x = x2 if columns is None else x2.index_select(1, columns)
        dw = kept_dy.t() @ kept_x
    if mask[2] and b is not None:
        db = dy2.sum(0)
        db = db if rows is None else db.index_select(0, rows)
    if mask[3] and row_logits is not None:
        dr = _to_logits((dy2 * y2).sum(0), row_logits, call.row_layout, call)
    return dx, dw, db, dr, dc


def _to_logits(dz: Tensor, logits: Tensor, layout: list[int], call: GatedCall) -> Tensor:
    """Return dθ of a side whose closed gates have dz = 0: straight-through."""
    return reference.gate_logit_gradient(
        dz, torch.ones(dz.shape[0]), logits, False, layout, *call.law, True
    )
