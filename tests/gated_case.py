"""One gated Linear with everything its ops take, and its exact result in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from finegates import GateConfig
from finegates.ops import _triton_gated, reference
from finegates.ops.gated_call import GatedCall
from numerics import assert_no_worse

FUSED = (_triton_gated.gated_matmul_fused, _triton_gated.gated_matmul_backward_fused)
FOLD = (_triton_gated.gated_matmul_fold, _triton_gated.gated_matmul_backward_fold)
FROZEN = [True, False, True, True, True]
PRETRAINING = [True] * 5
NAMES = ("x", "w", "b", "row_logits", "column_logits")


@dataclass
class Case:
    """The operands of one call of `gated_matmul` and of its backward, which a test may change."""

    x: Tensor
    w: Tensor
    b: Tensor | None
    row_logits: Tensor | None
    column_logits: Tensor | None
    seed: Tensor | None
    row_layout: list[int]
    column_layout: list[int]
    config: GateConfig
    closed_grad: bool = False
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """N and K of the dense layer."""
        n = self.row_layout[0] if self.rows is not None else self.w.shape[0]
        return n, self.x.shape[-1]

    @property
    def constants(self) -> tuple[Any, ...]:
        return (self.config.distribution, *self.config.constants, self.closed_grad)

    def to(self, device: str) -> Case:
        """Return the same case on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in values.items()}
        return Case(**moved)

    def call(self) -> GatedCall:
        """Return the operands as the implementations take them."""
        return GatedCall(
            self.x, self.w, self.b, self.row_logits, self.column_logits, self.seed, self.rows,
            self.columns, self.size[0], self.row_layout, self.column_layout, *self.constants,
        )  # fmt: skip

    def exact(self, dy: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return y and the five gradients in fp64 for the fp32 gates r and c, all by definition."""
        x, w, dy = self.x.double(), self.w.double(), dy.double()
        b = None if self.b is None else self.b.double()
        rows = slice(None) if self.rows is None else self.rows.long()
        columns = slice(None) if self.columns is None else self.columns.long()
        n, k = self.size
        compact = self.call().compact
        r = x.new_ones(n) if compact or self.row_logits is None else r.double()
        c = x.new_ones(k) if compact or self.column_logits is None else c.double()
        tokens = math.prod(x.shape[:-1])
        x2, dy2 = x.reshape(tokens, k)[:, columns], dy.reshape(tokens, n)[:, rows]
        v = (x2 * c[columns]) @ w.t()
        if b is not None:
            v = v + b
        y = x.new_zeros(x2.shape[0], n)
        y[:, rows] = v * r[rows]
        u = (dy2 * r[rows]) @ w
        dx = x.new_zeros(x2.shape[0], k)
        dx[:, columns] = u * c[columns]
        dw = (dy2 * r[rows]).t() @ (x2 * c[columns])
        db = None if b is None else r[rows] * dy2.sum(0)
        dr, dc = x.new_zeros(n), x.new_zeros(k)
        dr[rows], dc[columns] = (dy2 * v).sum(0), (x2 * u).sum(0)
        noise, (distribution, *scalars, closed) = self.seed is not None, self.constants
        tail = (distribution, *scalars, closed or compact)
        sides: list[Tensor | None] = []
        for dz, z, logits, layout in (
            (dr, r, self.row_logits, self.row_layout),
            (dc, c, self.column_logits, self.column_layout),
        ):
            if logits is None:
                sides.append(None)
                continue
            sides.append(
                reference.gate_logit_gradient(dz, z, logits.double(), noise, layout, *tail)
            )
        return y.reshape(*x.shape[:-1], n), [dx.reshape(x.shape), dw, db, *sides]


def make(
    m: int | tuple[int, ...],
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    distribution: str = "gaussian",
    bias: bool = True,
    sides: str = "rc",
    noise: bool = True,
    closed_grad: bool = False,
    spread: float = 0.7,
) -> Case:
    """Draw a case whose gates are partly closed, partly open and partly between."""
    g = torch.Generator().manual_seed(1)
    config = GateConfig(distribution=distribution)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def logits(size: int) -> Tensor:
        return draw(size) * spread + 0.5 * (config.closing_logit + config.start_logit)

    shape = (m,) if isinstance(m, int) else m
    return Case(
        x=draw(*shape, k).to(dtype),
        w=(draw(n, k) / max(k, 1) ** 0.5).to(dtype),
        b=draw(n).to(dtype) if bias else None,
        row_logits=logits(n) if "r" in sides else None,
        column_logits=logits(k) if "c" in sides else None,
        seed=torch.randint(0, 2**31 - 1, (2,), generator=g)
        if noise and distribution != "ranking"
        else None,
        row_layout=[max(n, 1)] * 2,
        column_layout=[max(k, 1)] * 2,
        config=config,
        closed_grad=closed_grad,
    )


def check(case: Case, how: tuple[Callable[..., Any], ...], mask: list[bool]) -> None:
    """Compare y and the wanted gradients with fp64, beside plain PyTorch at the same dtype."""
    forward, backward = how
    y, r, c = forward(case.call())
    _, plain_r, plain_c = reference.gated_matmul(case.call())
    torch.testing.assert_close(r, plain_r, atol=2e-6, rtol=0)
    torch.testing.assert_close(c, plain_c, atol=2e-6, rtol=0)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    exact_y, exact = case.exact(dy, r, c)
    plain_y = plain_forward(case, r, c)
    assert_no_worse(y, plain_y, exact_y)
    grads = backward(case.call(), dy, y, r, c, mask)
    plain = reference.gated_matmul_backward(case.call(), dy, plain_y, r, c, mask)
    for name, ours, theirs, true, wanted in zip(NAMES, grads, plain, exact, mask, strict=True):
        if not wanted or true is None:
            assert ours.numel() == 0, name
            continue
        assert_no_worse(ours.reshape(true.shape), theirs.reshape(true.shape), true)


def plain_forward(case: Case, r: Tensor, c: Tensor) -> Tensor:
    """Return y by elementwise passes around a Linear, for the gates r and c."""
    n, k = case.size
    x, y = case.x, case.x.new_zeros(*case.x.shape[:-1], n)
    rows = slice(None) if case.rows is None else case.rows.long()
    columns = slice(None) if case.columns is None else case.columns.long()
    if not case.call().compact:
        x = x if case.column_logits is None else x * c.to(x.dtype)
        row = None if case.row_logits is None else r[rows].to(x.dtype)
    else:
        row = None
    y[..., rows] = reference.gated_linear(x[..., columns], case.w, case.b, row, None)
    return y
