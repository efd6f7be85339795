"""The law: plain PyTorch definitions of every op, and the fallback of every backend."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 0xFFFFFFFF
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda t: t,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
ACTIVATIONS = tuple(_ACTIVATIONS)


def _high_word(a: Tensor, b: int) -> Tensor:
    """Return the high 32 bits of the 64-bit product; the signed wrap leaves its bits right."""
    return ((a * b) >> 32) & _WORD


def philox(seed: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011), one counter per element.

    Args:
        seed (`Tensor` int64 [1]): the key; its low and high words.
        count: number of counters, 0 … count - 1.

    Returns:
        Four int64 tensors [count] of 32-bit words: the numbers Triton's ``tl.randint4x`` gives for
        the same seed and offsets.
    """
    c0 = torch.arange(count, dtype=torch.int64, device=seed.device)
    c1 = c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        c0, c1, c2, c3 = (
            _high_word(c2, 0xCD9E8D57) ^ c1 ^ k0,
            (c2 * 0xCD9E8D57) & _WORD,
            _high_word(c0, 0xD2511F53) ^ c3 ^ k1,
            (c0 * 0xD2511F53) & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _unit_interval(words: Tensor) -> Tensor:
    """Map 32-bit words to fp32 in [0, 1), as ``tl.rand`` does: fold the sign, scale by 2⁻³¹."""
    signed = torch.where(words > 0x7FFFFFFF, words - (1 << 32), words)
    folded = torch.where(signed < 0, -signed - 1, signed)
    return folded.to(torch.float32) * 4.6566127342e-10


def uniform(seed: Tensor, count: int) -> Tensor:
    """Return fp32 uniforms [count] in [0, 1) from an int64 seed [1], equal to ``tl.rand``."""
    return _unit_interval(philox(seed, count)[0])


def normal(seed: Tensor, count: int) -> Tensor:
    """Return fp32 normals [count] by Box-Muller from an int64 seed [1], equal to ``tl.randn``."""
    first, second, _, _ = philox(seed, count)
    u1 = _unit_interval(first).clamp(min=1.0e-7)
    return torch.sqrt(-2.0 * torch.log(u1)) * torch.cos(2.0 * math.pi * _unit_interval(second))


def gated_linear(
    x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None, c: Tensor | None
) -> Tensor:
    """y = r ⊙ ((x ⊙ c) wᵀ + b); a missing gate is all ones.

    Args:
        x (`Tensor` [..., K]), w (`Tensor` [N, K]), b (`Tensor` [N]): operands of one dtype.
        r (`Tensor` [N]), c (`Tensor` [K]): gate values of the same dtype.

    Returns:
        `Tensor` [..., N].
    """
    y = F.linear(x if c is None else x * c, w, b)
    return y if r is None else y * r


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gated_linear` without its pre-gate output (DESIGN §2.1).

    With u = (dy ⊙ r) w:  dx = u ⊙ c,  dc = Σ x ⊙ u,  db = r ⊙ Σ dy,  dw = (dy ⊙ r)ᵀ (x ⊙ c), and
    dr = Σ dy ⊙ y / r where r ≠ 0. Rows with r = 0 have lost their pre-gate output: with
    ``closed_row_grad`` it is computed again for those rows alone, otherwise their dr is 0.

    Args:
        mask: which of dx, dw, db, dr, dc are wanted; the others come back empty.

    Returns:
        dx, dw, db, dr, dc.
    """
    # One tensor each: outputs of an op may not alias.
    dx, dw, db, dr, dc = (x.new_empty(0) for _ in range(5))
    tokens = math.prod(x.shape[:-1])
    dy2, x2, y2 = (t.reshape(tokens, t.shape[-1]) for t in (dy, x, y))
    dv = dy2 if r is None else dy2 * r
    if mask[0] or (mask[4] and c is not None):
        u = dv @ w
        if mask[0]:
            dx = (u if c is None else u * c).reshape(x.shape)
        if mask[4] and c is not None:
            dc = (x2 * u).sum(0)
    if mask[1]:
        dw = dv.t() @ (x2 if c is None else x2 * c)
    if mask[2] and b is not None:
        db = dv.sum(0)
    if mask[3] and r is not None:
        closed = r == 0
        dr = (dy2 * y2).sum(0) / torch.where(closed, torch.ones_like(r), r)
        if closed_row_grad:
            rows = closed.nonzero().squeeze(1)
            pre = F.linear(x2 if c is None else x2 * c, w[rows], None if b is None else b[rows])
            dr = dr.index_copy(0, rows, (dy2[:, rows] * pre).sum(0))
    return dx, dw, db, dr, dc


def pruned_linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    out_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """y[..., rows] = act(x[..., columns] wᵀ + b), every other output exactly 0, plus the residual.

    Args:
        x (`Tensor` [..., K]): input; only the kept columns are read.
        w (`Tensor` [n, k]): compact weight; b (`Tensor` [n]): compact bias.
        rows, columns (`Tensor` int32 [n], [k]): sorted kept indices; None keeps all.
        out_features: N; activation: one of `ACTIVATIONS`, each with act(0) = 0.
        residual (`Tensor` [..., N]): added at the end.

    Returns:
        `Tensor` [..., N] of x's dtype.
    """
    kept = x if columns is None else x.index_select(-1, columns)
    y = _ACTIVATIONS[activation](
        F.linear(kept.to(w.dtype), w, None if b is None else b.to(w.dtype))
    ).to(x.dtype)
    if rows is not None:
        y = y.new_zeros(*y.shape[:-1], out_features).index_copy(-1, rows.long(), y)
    return y if residual is None else y + residual
