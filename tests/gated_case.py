"""One gated Linear with everything its ops take, and its exact result in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finegates import GateConfig
from finegates.ops import reference

NAMES = ("x", "w", "b", "row_logits", "column_logits")


@dataclass
class Case:
    """Operands of `gated_matmul` and of its backward, as the implementations take them."""

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

    def forward_args(self) -> tuple[Any, ...]:
        return (
            self.x, self.w, self.b, self.row_logits, self.column_logits, self.seed, self.rows,
            self.columns, self.size[0], self.row_layout, self.column_layout, *self.constants,
        )  # fmt: skip

    def backward_args(
        self, dy: Tensor, y: Tensor, r: Tensor, c: Tensor, mask: list[bool]
    ) -> tuple[Any, ...]:
        return (
            dy, self.x, self.w, self.b, self.row_logits, self.column_logits, self.seed is not None,
            self.rows, self.columns, y, r, c, self.row_layout, self.column_layout, *self.constants,
            mask,
        )  # fmt: skip

    def exact(self, dy: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return y and the five gradients in fp64 for the fp32 gates r and c, all by definition."""
        x, w, dy = self.x.double(), self.w.double(), dy.double()
        b = None if self.b is None else self.b.double()
        rows = slice(None) if self.rows is None else self.rows.long()
        columns = slice(None) if self.columns is None else self.columns.long()
        n, k = self.size
        compact = self.rows is not None or self.columns is not None
        one = torch.ones
        r = one(n).double() if compact or self.row_logits is None else r.double()
        c = one(k).double() if compact or self.column_logits is None else c.double()
        tokens = math.prod(x.shape[:-1])
        x2, dy2 = x.reshape(tokens, k)[:, columns], dy.reshape(tokens, n)[:, rows]
        v = (x2 * c[columns]) @ w.t()
        if b is not None:
            v = v + b
        y = torch.zeros(x2.shape[0], n, dtype=torch.float64)
        y[:, rows] = v * r[rows]
        u = (dy2 * r[rows]) @ w
        dx = torch.zeros(x2.shape[0], k, dtype=torch.float64)
        dx[:, columns] = u * c[columns]
        dw = (dy2 * r[rows]).t() @ (x2 * c[columns])
        db = None if b is None else r[rows] * dy2.sum(0)
        dr, dc = torch.zeros(n).double(), torch.zeros(k).double()
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
