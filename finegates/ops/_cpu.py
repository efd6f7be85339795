"""The native CPU backend (placeholder until the kernels land)."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def status() -> str | None:
    return "extension not built"


def why_not(*args: Any) -> str | None:
    return status()


def pruned_linear(*args: Any) -> Tensor:
    raise NotImplementedError


def pack_weight(weight: Tensor) -> Tensor | None:
    return None
