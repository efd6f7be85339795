"""The Triton backend: why it can or can't serve, and the calls into ``finegates.kernels``."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor


def status() -> str | None:
    """Return why Triton kernels can't run here, or None."""
    return "no gated_linear kernel in this release"


def why_not(
    x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None, c: Tensor | None
) -> str | None:
    """Return why this call can't run on Triton, or None."""
    return status()


def gated_linear(
    x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None, c: Tensor | None
) -> NoReturn:
    """Run the fused kernel; never reached while `why_not` refuses."""
    raise NotImplementedError(status())
