"""The one tolerance rule of the test suite; import it as ``from numerics import ...``.

A result may err twice as much as plain PyTorch at the same dtype. For an op the error is the
largest one (`assert_no_worse`): each output has roundings of its own, so that the largest of many
hardly depends on their luck. For a whole model it is the root mean square over outputs and a few
draws of its weights (`assert_models_no_worse`). There one rounding in an early layer reaches every
output, amplified along the few directions that attention and norms amplify, so that the largest
error of one model is about one draw from a wide law, and twice a lucky draw refuses equals: the
gated fp32 Qwen2 of test_prune, evaluated with the columns of its Linears summed in 200 random
orders, errs by 2.1e-6 to 1.15e-5 where its own order errs by 3.6e-6, and 5 % of these orders fail
against that one. The root mean square averages over directions and draws: for equals its ratio is
near 1 (pruned to gated, 160 draws: 1.80 for the worst, 1.62 for the worst 4 together), while a step
that loses precision raises it for every draw.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_no_worse(
    ours: Tensor,
    plain: Tensor,
    exact: Tensor,
    magnitude: float = 0.0,
    stored: Tensor | None = None,
) -> None:
    """Assert that ours errs by no more than twice plain and what plain has no part in.

    max|ours - exact| ≤
        2 max|plain - exact| + eps max|exact| + eps₃₂ magnitude + max|stored - exact|

    The second term is the first again for a plain result that is exact by luck: storing the largest
    value costs up to eps / 2 of it, whoever computes.

    The third does the same for the fp32 sums behind a few outputs, and behind sums that plain forms
    in another order. With u = eps₃₂ / 2 one rounding of a partial sum s costs up to u |s|. Adding n
    products of mean 0 and deviation σ one after the other, as a GEMM does, the partial sums are
    σ √j, and n independent roundings within ± u σ √j add up to a deviation of
    u σ √(Σ j / 3) = u σ n / √6: with Σ|products| ≈ 0.64 n σ it is 0.64 u magnitude whatever n is,
    and the term is three of them. Pairs of sums, as of ``Tensor.sum``, err √n less.

    The fourth is for an operand that ours stores rounded, such as a weight with its gates folded in
    or the y that a gradient is computed from: the exact result moves by that much, whoever computes
    with it. Plain may store none, or may be lucky with its own where outputs are few.

    Args:
        ours: the result under test.
        plain: the same formula in plain PyTorch at the same dtype.
        exact: the same formula in fp64, from the same (already rounded) operands. For fp64 results
            it is no better than they are: compare those with a relative difference.
        magnitude: the largest sum of absolute products, max Σ|x||w|; of sums over independent sums
            the root of the sum of squares. For tests that draw a few outputs over and over and for
            another order, 0 otherwise.
        stored: ``exact``, but from the operand as ours stores it.
    """
    assert ours.dtype == plain.dtype, f"dtype {ours.dtype} instead of {plain.dtype}"
    assert ours.shape == plain.shape == exact.shape, f"shape {ours.shape} not {exact.shape}"
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    error = (ours.double() - exact).abs().max().item()
    allowed = 2.0 * (plain.double() - exact).abs().max().item()
    allowed += torch.finfo(plain.dtype).eps * exact.abs().max().item()
    allowed += torch.finfo(torch.float32).eps * magnitude
    if stored is not None:
        allowed += (stored - exact).abs().max().item()
    # A NaN anywhere makes the comparison false.
    assert error <= allowed, f"error {error:.3e} above the allowed {allowed:.3e}"


def assert_models_no_worse(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """Assert rms(ours - exact) <= 2 rms(plain - exact) + eps rms(exact) over outputs and draws.

    Args:
        ours, plain, exact: outputs of several draws of a model, as `assert_no_worse` takes one.
    """
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == b.dtype, f"dtype {a.dtype} instead of {b.dtype}"
        assert a.shape == b.shape == c.shape, f"shape {a.shape} not {c.shape}"
        assert c.dtype == torch.float64
    truth = _flat(exact)
    error = _rms(_flat(ours) - truth)
    allowed = 2.0 * _rms(_flat(plain) - truth) + torch.finfo(plain[0].dtype).eps * _rms(truth)
    # A NaN anywhere makes the comparison false.
    assert error <= allowed, f"error {error:.3e} above the allowed {allowed:.3e}"


def _flat(draws: list[Tensor]) -> Tensor:
    return torch.cat([draw.flatten() for draw in draws]).double()


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return max|a - b| / max|b|, NaN if either holds one."""
    return ((a - b).abs().max() / b.abs().max()).item()
