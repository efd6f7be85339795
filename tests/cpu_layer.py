"""A random pruned layer for the tests of the native CPU path; ``from cpu_layer import ...``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finegates.ops import _cpu
from numerics import assert_no_worse

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ACTIVATE: dict[str, Any] = {
    "none": lambda t: t,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class Layer:
    """A random pruned layer, its packed form and its two references."""

    def __init__(
        self,
        out_features: int,
        in_features: int,
        n_rows: int | None = None,
        n_columns: int | None = None,
        dtype: torch.dtype = F32,
        bias: bool = True,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.out_features, self.in_features = out_features, in_features
        self.rows = self._kept(out_features, n_rows, g)
        self.columns = self._kept(in_features, n_columns, g)
        n = out_features if n_rows is None else n_rows
        k = in_features if n_columns is None else n_columns
        self.weight = (torch.randn(n, k, generator=g) / max(1, k) ** 0.5).to(dtype)
        self.bias = torch.randn(n, generator=g) if bias else None
        self.packed = _cpu.prepare(
            self.weight, self.bias, self.rows, self.columns, out_features, in_features
        )

    @staticmethod
    def _kept(full: int, kept: int | None, g: torch.Generator) -> Tensor | None:
        if kept is None:
            return None
        return torch.randperm(full, generator=g)[:kept].sort().values.int()

    def run(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        return _cpu.pruned_linear(x, self.packed, self.out_features, activation, residual)

    def expected(
        self,
        x: Tensor,
        dtype: torch.dtype,
        activation: str = "none",
        residual: Tensor | None = None,
    ) -> Tensor:
        """The formula in plain PyTorch at ``dtype``."""
        kept = x if self.columns is None else x.index_select(-1, self.columns)
        bias = None if self.bias is None else self.bias.to(dtype)
        z = ACTIVATE[activation](F.linear(kept.to(dtype), self.weight.to(dtype), bias))
        y = torch.zeros(*x.shape[:-1], self.out_features, dtype=dtype)
        if self.rows is None:
            y = z
        else:
            y.index_copy_(-1, self.rows.long(), z)
        return y if residual is None else y + residual.to(dtype)

    def magnitude(self, x: Tensor) -> float:
        kept = x if self.columns is None else x.index_select(-1, self.columns)
        sums = F.linear(kept.double().abs(), self.weight.double().abs())
        largest = sums.max().item() if sums.numel() else 0.0
        return largest + (0.0 if self.bias is None else 4.0)

    def check(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        y = self.run(x, activation, residual)
        assert_no_worse(
            y,
            self.expected(x, x.dtype, activation, residual),
            self.expected(x, torch.float64, activation, residual),
            2 * self.magnitude(x),
        )
        if self.rows is not None and residual is None:
            removed = torch.ones(self.out_features, dtype=torch.bool)
            removed[self.rows.long()] = False
            assert (y[..., removed] == 0).all()
        return y


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SHAPES = [  # out, in, kept rows, kept columns
    pytest.param(768, 768, 595, 595, id="768x768"),
    pytest.param(100, 90, 77, 61, id="100x90"),
    pytest.param(40, 900, 31, 801, id="several-K-blocks"),
    pytest.param(1000, 50, 3, 2, id="sparse"),
    pytest.param(33, 17, None, 9, id="all-rows"),
    pytest.param(33, 17, 5, None, id="all-columns"),
    pytest.param(129, 65, None, None, id="dense"),
    pytest.param(1, 1, 1, 1, id="one"),
]
