"""The law: plain PyTorch definitions of every op, and the fallback of every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import transformed
from .gated_call import TENSORS, GatedCall

DISTRIBUTIONS = ("ranking", "gaussian", "hard_concrete")
_WORD = 0xFFFFFFFF
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda t: t,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
ACTIVATIONS = tuple(ACTIVATION_FUNCTIONS)


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
    """y = r ⊙ ((x ⊙ c) wᵀ + b); a missing gate is all ones, and so open gates change no bit.

    Args:
        x (`Tensor` [..., K]), w (`Tensor` [N, K]), b (`Tensor` [N]): operands of one dtype.
        r (`Tensor` [N]), c (`Tensor` [K]): gate values of the same dtype.

    Returns:
        `Tensor` [..., N].
    """
    y = F.linear(x if c is None else _gated_input(x, c), w, b)
    return y if r is None else y * r


def _gated_input(x: Tensor, c: Tensor) -> Tensor:
    """x ⊙ c with the strides of x, by which ``F.linear`` and BLAS choose their order of summation.

    Where elements of x share memory that is possible for expanded dimensions only.
    """
    if x.is_contiguous() or transformed():
        return x * c
    once = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
    z = once * c
    if z.shape == once.shape and z.stride() != once.stride():
        reach = 0
        for stride, size in sorted(zip(once.stride(), once.shape, strict=True)):
            if size > 1 and stride <= reach:
                return x * c
            reach += stride * (size - 1)
        z = z.new_empty_strided(once.shape, once.stride()).copy_(z)
    return z.expand(x.shape)


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
    """Gradients of `gated_linear` without its pre-gate output (docs/method.md, Gradients).

    With u = (dy ⊙ r) w:  dx = u ⊙ c,  dc = Σ x ⊙ u,  db = r ⊙ Σ dy,  dw = (dy ⊙ r)ᵀ (x ⊙ c), and
    dr = Σ dy ⊙ y / r where r ≠ 0. Rows with r = 0 have lost their pre-gate output: with
    ``closed_row_grad`` it is computed again for those rows alone, otherwise their dr is 0.

    Args:
        y (`Tensor` [..., N]): the output; only dr reads it.
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
    y = ACTIVATION_FUNCTIONS[activation](
        F.linear(kept.to(w.dtype), w, None if b is None else b.to(w.dtype))
    ).to(x.dtype)
    if rows is not None:
        y = y.new_zeros(*y.shape[:-1], out_features).index_copy(-1, rows.long(), y)
    return y if residual is None else y + residual


class Operands(NamedTuple):
    """What a packed tensor holds; ``scale`` [n] only with an int8 weight."""

    weight: Tensor
    bias: Tensor | None
    rows: Tensor | None
    columns: Tensor | None
    scale: Tensor | None


def packed_linear(
    x: Tensor,
    layer: Operands,
    out_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`pruned_linear` with weight ⊙ scale, in the wider of its dtype and x's."""
    w, b, rows, columns, scale = layer
    w = w if scale is None else w * scale[:, None]
    wide = torch.promote_types(x.dtype, w.dtype)
    y = pruned_linear(x.to(wide), w.to(wide), b, rows, columns, out_features, activation)
    y = y.to(x.dtype)
    return y if residual is None else y + residual


def packed_embedding(ids: Tensor, layer: Operands, features: int, dtype: torch.dtype) -> Tensor:
    """Rows of weight ⊙ scale [N, features]."""
    w = layer.weight if layer.scale is None else layer.weight * layer.scale[:, None]
    return F.embedding(ids, w.view(-1, features)).to(dtype)


def packed_linears(
    x: Tensor, layers: Sequence[Operands], out_features: Sequence[int]
) -> list[Tensor]:
    """`packed_linear` of each layer."""
    return [packed_linear(x, layer, n) for layer, n in zip(layers, out_features, strict=True)]


def packed_glu(
    x: Tensor, gate: Operands, up: Operands, out_features: int, activation: str = "silu"
) -> Tensor:
    """act(gate(x)) ⊙ up(x)."""
    y = packed_linear(x, gate, out_features, activation)
    return y * packed_linear(x, up, out_features)


def gate(
    logits: Tensor,
    seed: Tensor | None,
    layout: list[int],
    size: int,
    distribution: str,
    shift: float,
    scale: float,
    beta: float,
) -> Tensor:
    """The gates [size] of one side, fp32: `unit_gate` of the unit that each feature belongs to.

    Args:
        layout: (span, width): feature i belongs to unit (i // span) width + i mod width.
        size: number of features.
    """
    z = unit_gate(logits, seed, distribution, shift, scale, beta)
    return z[unit_of(layout, size, logits.device)]


def unit_gate(
    logits: Tensor,
    seed: Tensor | None,
    distribution: str,
    shift: float,
    scale: float,
    beta: float,
) -> Tensor:
    """The gates [units], fp32; `GateConfig.constants` gives shift, scale and beta.

    - ranking: 1[θ > 0]
    - gaussian: clamp(tanh θ + shift + scale ε, 0, 1)
    - hard_concrete: clamp(shift + scale sigmoid((logit u + θ) / beta), 0, 1); beta is 1 without u

    A NaN logit gives a NaN gate.

    Args:
        logits (`Tensor` fp32 [units]): θ.
        seed (`Tensor` int64 [1]): of the noise; None for the value without noise.
    """
    if distribution == "ranking":
        z = logits.clamp(0.0, 1.0).ceil()  # keeps a NaN, which a comparison would hide
    elif distribution == "gaussian":
        z = torch.tanh(logits) + shift
        if seed is not None:
            z = z + scale * normal(seed, logits.numel())
    else:
        s = logits
        if seed is not None:
            u = uniform(seed, logits.numel()).clamp(1e-6, 1.0 - 1e-6)
            s = (torch.logit(u) + logits) / beta
        z = torch.sigmoid(s) * scale + shift
    return torch.clamp(z, 0.0, 1.0)


def unit_of(layout: list[int], size: int, device: torch.device) -> Tensor:
    """Return the unit of each of the ``size`` features of a side with this (span, width)."""
    span, width = layout
    feature = torch.arange(size, device=device)
    return torch.div(feature, span, rounding_mode="floor") * width + feature % width


def gate_logit_gradient(
    dz: Tensor,
    z: Tensor,
    logits: Tensor,
    noise: bool,
    layout: list[int],
    distribution: str,
    shift: float,
    scale: float,
    beta: float,
    closed_grad: bool,
) -> Tensor:
    """dθ [units] from dz and the values z [size] alone; a clamped gate gets none.

    dz/dθ is 1 for ranking (straight-through; for open gates only unless ``closed_grad``),
    1 - tanh² θ for gaussian, scale s (1 - s) / beta with s = (z - shift) / scale for hard_concrete
    (beta is 1 without noise).
    """
    unit = unit_of(layout, z.numel(), z.device)
    if distribution == "ranking":
        derivative = torch.ones_like(z) if closed_grad else z
    else:
        if distribution == "gaussian":
            derivative = 1.0 - torch.tanh(logits[unit]).square()
        else:
            s = (z - shift) / scale
            derivative = scale * s * (1.0 - s) / (beta if noise else 1.0)
        derivative = torch.where((z > 0.0) & (z < 1.0), derivative, torch.zeros_like(z))
    # A clamped gate passes no NaN on.
    gradient = torch.where(derivative == 0.0, derivative, dz.to(logits.dtype) * derivative)
    if logits.numel() == z.numel():
        return gradient
    return torch.zeros_like(logits).index_add(0, unit, gradient)


def open_probability(logits: Tensor, distribution: str, shift: float, scale: float) -> Tensor:
    """P(z > 0) of each unit; `GateConfig.open_constants` gives shift and scale.

    Φ((tanh θ + shift) / scale) for gaussian, sigmoid(θ - shift) for hard_concrete and 1[θ > 0] for
    ranking.
    """
    if distribution == "gaussian":
        p: Tensor = torch.special.ndtr((torch.tanh(logits) + shift) / scale)
        return p
    if distribution == "hard_concrete":
        return torch.sigmoid(logits - shift)
    return (logits > 0).to(logits.dtype)


def open_mass(
    logits: Tensor, offsets: Tensor, distribution: str, shift: float, scale: float
) -> Tensor:
    """Σ `open_probability` of each vector of gates; vector s starts at logits[offsets[s]].

    Args:
        logits (`Tensor` fp32 [U]): all gates of a model, one after the other.
        offsets (`Tensor` int64 [S + 1]): from 0 to U.

    Returns:
        `Tensor` fp32 [S].
    """
    p = open_probability(logits, distribution, shift, scale)
    return torch.segment_reduce(p, "sum", offsets=offsets)


def open_mass_backward(
    dout: Tensor, logits: Tensor, offsets: Tensor, distribution: str, shift: float, scale: float
) -> Tensor:
    """dθ [U] of `open_mass`; straight-through for ranking."""
    if distribution == "gaussian":
        t = torch.tanh(logits)
        a = (t + shift) / scale
        derivative = torch.exp(-0.5 * a.square()) * (1.0 - t.square())
        derivative = derivative / (scale * math.sqrt(2.0 * math.pi))
    elif distribution == "hard_concrete":
        p = torch.sigmoid(logits - shift)
        derivative = p * (1.0 - p)
    else:
        derivative = torch.ones_like(logits)
    return dout.repeat_interleave(offsets.diff(), output_size=logits.numel()) * derivative


def norm_gather(
    x: Tensor,
    columns: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
) -> Tensor:
    """The kept columns of a normalised x, side by side.

    Args:
        x (`Tensor` [..., K]): statistics run over all K features, in fp32.
        columns (`Tensor` int32 [k]): kept features.
        weight, bias (`Tensor` [K]): of the norm.
        norm: ``"rms"``: x / √(mean x² + eps), ``"layer"``: (x - mean) / √(var + eps), ``"none"``.

    Returns:
        `Tensor` [..., k] of x's dtype.
    """
    y = x if x.dtype == torch.float64 else x.float()
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if norm != "none":
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y.index_select(-1, columns)
    if weight is not None:
        y = y * weight[columns]
    if bias is not None:
        y = y + bias[columns]
    return y.to(x.dtype)


def gated_matmul(call: GatedCall) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_linear` with gates sampled from logits, or the compact Linear of open ranking gates.

    ``rows`` and ``columns`` that keep every feature say in which order w and b hold them.

    Returns:
        y [..., N] and the gates r [N], c [K] in fp32; empty where a side has no logits, and for a
        compact weight.
    """
    x, w, b, row_logits, column_logits, seed, rows, columns = call[:TENSORS]
    r = c = None
    if call.compact:
        y = pruned_linear(x, w, b, rows, columns, call.out_features)
    else:
        keys = (None, None) if seed is None else (seed[:1], seed[1:])
        if row_logits is not None:
            r = gate(row_logits, keys[0], call.row_layout, call.out_features, *call.law)
        if column_logits is not None:
            c = gate(column_logits, keys[1], call.column_layout, call.in_features, *call.law)
        placed = x if columns is None else x[..., columns.long()]
        y = gated_linear(placed, w, b, _cast(r, rows, w), _cast(c, columns, w))
        y = _spread(y, rows, call.out_features)
    r, c = (x.new_empty(0, dtype=torch.float32) if z is None else z for z in (r, c))
    return y, r, c


def _cast(z: Tensor | None, index_map: Tensor | None, w: Tensor) -> Tensor | None:
    """Return the gates of a side in w's order and dtype."""
    if z is None:
        return None
    return (z if index_map is None else z[index_map.long()]).to(w.dtype)


def gated_matmul_backward(
    call: GatedCall, dy: Tensor, y: Tensor, r: Tensor, c: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gated_matmul`: `gated_linear_backward`, then dz/dθ from the values alone.

    A compact weight takes dy and x at the open features; closed units get none.

    Returns:
        dx, dw, db, drow_logits, dcolumn_logits; what ``mask`` doesn't want is empty.
    """
    x, w, b, row_logits, column_logits, seed, rows, columns = call[:TENSORS]
    if call.compact:
        r, c = (torch.ones(n, device=w.device) for n in (call.out_features, call.in_features))
    kept_rows = slice(None) if rows is None else rows.long()
    kept_columns = slice(None) if columns is None else columns.long()
    dx, dw, db, dr, dc = gated_linear_backward(
        dy[..., kept_rows],
        x[..., kept_columns],
        w,
        b,
        None if row_logits is None else r[kept_rows].to(w.dtype),
        None if column_logits is None else c[kept_columns].to(w.dtype),
        y[..., kept_rows],
        call.closed_grad,
        mask,
    )
    if mask[0]:
        dx = _spread(dx, columns, call.in_features)
    tail = (*call.law, call.closed_grad or call.compact)
    noise = seed is not None
    if row_logits is not None and mask[3]:
        dr = _spread(dr, rows, call.out_features)
        dr = gate_logit_gradient(dr, r, row_logits, noise, call.row_layout, *tail)
    if column_logits is not None and mask[4]:
        dc = _spread(dc, columns, call.in_features)
        dc = gate_logit_gradient(dc, c, column_logits, noise, call.column_layout, *tail)
    return dx, dw, db, dr, dc


def _spread(kept: Tensor, index_map: Tensor | None, size: int) -> Tensor:
    """Put the kept features into their places among zeros."""
    if index_map is None:
        return kept
    return kept.new_zeros(*kept.shape[:-1], size).index_copy(-1, index_map.long(), kept)
