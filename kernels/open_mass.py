"""Expected number of open units per gate vector, for all gates of a model at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, ROW_WISE


@triton.jit
def _open_probability(theta, shift, scale, DISTRIBUTION: tl.constexpr):
    """Return P(open): Φ((tanh θ + shift) / scale), sigmoid(θ - shift), or 1[θ > 0]."""
    shift = tl.to_tensor(shift).to(tl.float32)
    if DISTRIBUTION == "gaussian":
        a = (2.0 * tl.sigmoid(2.0 * theta) - 1.0 + shift) / tl.to_tensor(scale).to(tl.float32)
        p = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
    elif DISTRIBUTION == "hard_concrete":
        p = tl.sigmoid(theta - shift)
    else:
        p = (theta > 0.0).to(tl.float32)
    return p


@triton.jit
def _open_mass_fwd_kernel(
    logits_ptr, offsets_ptr, out_ptr, shift, scale,
    DISTRIBUTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One gate vector a program, added in the order of its blocks."""
    vector = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets_ptr + vector)
    last = tl.load(offsets_ptr + vector + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        unit = start + tl.arange(0, BLOCK).to(tl.int64)
        theta = tl.load(logits_ptr + unit, mask=unit < last, other=0.0)
        p = _open_probability(theta, shift, scale, DISTRIBUTION)
        total += tl.where(unit < last, p, 0.0)
    tl.store(out_ptr + vector, tl.sum(total))


@triton.jit
def _open_mass_bwd_kernel(
    dout_ptr, logits_ptr, offsets_ptr, dlogits_ptr, shift, scale,
    DISTRIBUTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dθ = dout dp/dθ: φ(a) (1 - tanh² θ) / scale, p (1 - p), or 1 (straight-through)."""
    vector = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets_ptr + vector)
    last = tl.load(offsets_ptr + vector + 1)
    dout = tl.load(dout_ptr + vector)
    shift = tl.to_tensor(shift).to(tl.float32)
    scale = tl.to_tensor(scale).to(tl.float32)
    for start in range(first, last, BLOCK):
        unit = start + tl.arange(0, BLOCK).to(tl.int64)
        theta = tl.load(logits_ptr + unit, mask=unit < last, other=0.0)
        if DISTRIBUTION == "gaussian":
            s = tl.sigmoid(2.0 * theta)
            a = (2.0 * s - 1.0 + shift) / scale
            d = 0.3989422804014327 * tl.exp(-0.5 * a * a) * 4.0 * s * (1.0 - s) / scale
        elif DISTRIBUTION == "hard_concrete":
            p = tl.sigmoid(theta - shift)
            d = p * (1.0 - p)
        else:
            d = tl.full(theta.shape, 1.0, tl.float32)
        tl.store(dlogits_ptr + unit, dout * d, mask=unit < last)


def open_mass_fwd(
    logits: Tensor, offsets: Tensor, distribution: str, shift: float, scale: float
) -> Tensor:
    """Launch on logits [U] and offsets int64 [S + 1]; return Σ P(open) per vector, fp32 [S]."""
    vectors = offsets.shape[0] - 1
    out = torch.empty(vectors, dtype=torch.float32, device=logits.device)
    if vectors:
        _open_mass_fwd_kernel[(vectors,)](
            logits, offsets, out, shift, scale, DISTRIBUTION=distribution,
            **ROW_WISE, **OPTIONS,
        )  # fmt: skip
    return out


def open_mass_bwd(
    dout: Tensor, logits: Tensor, offsets: Tensor, distribution: str, shift: float, scale: float
) -> Tensor:
    """Launch the gradient of `open_mass_fwd`; return dlogits [U]."""
    dlogits = torch.empty_like(logits)
    vectors = offsets.shape[0] - 1
    if vectors:
        _open_mass_bwd_kernel[(vectors,)](
            dout, logits, offsets, dlogits, shift, scale, DISTRIBUTION=distribution,
            **ROW_WISE, **OPTIONS,
        )  # fmt: skip
    return dlogits
