"""The one tolerance rule of the test suite; import it as ``from numerics import ...``."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_no_worse(ours: Tensor, plain: Tensor, exact: Tensor, magnitude: float = 0.0) -> None:
    """Assert max|ours - exact| <= 2 max|plain - exact| + eps max|exact| + eps₃₂ magnitude.

    The second term is the first again for a plain result that is exact by luck: storing the largest
    value costs up to eps / 2 of it, whoever computes. The third does the same for the fp32 sums
    behind a few outputs: one rounding of a partial sum costs up to eps₃₂ / 2 of ``magnitude``.

    Args:
        ours: the result under test.
        plain: the same formula in plain PyTorch at the same dtype.
        exact: the same formula in fp64, from the same (already rounded) operands. For fp64 results
            it is no better than they are: compare those with a relative difference.
        magnitude: the largest sum of absolute products, max Σ|x||w|; for tests that draw a few
            outputs over and over, 0 otherwise.
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
    # A NaN anywhere makes the comparison false.
    assert error <= allowed, f"error {error:.3e} above the allowed {allowed:.3e}"


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return max|a - b| / max|b|, NaN if either holds one."""
    return ((a - b).abs().max() / b.abs().max()).item()
