"""A small pruned Linear and its dense twin; ``from pruned_case import ...``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finegates import PrunedLinear, use_backend
from finegates.ops import pruned_linear, reference, table

NATIVE_REASON = next(why for op, name, why in table() if (op, name) == ("pruned_linear", "native"))
needs_native = pytest.mark.skipif(NATIVE_REASON is not None, reason=f"native: {NATIVE_REASON}")
# "default" asks for nothing, which opens the short way past the dispatcher.
BACKENDS = [
    pytest.param("default", id="default"),
    pytest.param("torch", id="torch"),
    pytest.param("native", id="native", marks=needs_native),
    pytest.param("auto", id="auto"),
]


def asking(backend: str) -> AbstractContextManager[None]:
    """Request a backend, or nothing at all."""
    return nullcontext() if backend == "default" else use_backend(backend)


ROWS = torch.tensor([0, 2, 3, 6])
COLUMNS = torch.tensor([1, 2, 5, 7, 8])


def example(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[nn.Linear, PrunedLinear]:
    """A dense Linear with zeros where the pruned one has nothing, and the pruned one."""
    linear = nn.Linear(9, 7, dtype=dtype).eval()
    pruned = PrunedLinear.from_linear(linear, ROWS, COLUMNS, **changes)
    return pruned.to_linear() if not changes else linear, pruned


def op_of(pruned: PrunedLinear, x: Tensor) -> Tensor:
    return pruned_linear(
        x, pruned.weight, pruned.bias, pruned.rows, pruned.columns, pruned.out_features
    )


def reference_of(pruned: PrunedLinear, x: Tensor) -> Tensor:
    return reference.pruned_linear(
        x, pruned.weight, pruned.bias, pruned.rows, pruned.columns, pruned.out_features
    )
