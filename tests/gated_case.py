"""One gated Linear with everything its ops take, and its exact result in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
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
ONLY_DX = [True, False, False, False, False]
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
        x, w, b, dy, r, c = self._at_kept(dy, r, c)
        v = (x * c) @ w.t() + b
        u = (dy * r) @ w
        y = self._at_features(v * r, self.rows, self.size[0])
        dx = self._at_features(u * c, self.columns, self.size[1])
        dw = (dy * r).t() @ (x * c)
        db = None if self.b is None else r * dy.sum(0)
        sides = self._to_logits((dy * v).sum(0), (x * u).sum(0), r, c)
        tokens = self.x.shape[:-1]
        return y.reshape(*tokens, self.size[0]), [dx.reshape(self.x.shape), dw, db, *sides]

    def magnitudes(self, dy: Tensor, r: Tensor, c: Tensor) -> list[Tensor | None]:
        """Return √Σ(w r |dy|ᵀ|x|)² and its like, where dr and dc are sums over G = dyᵀ x.

        Each element of G has the roundings of its own sum over the tokens, of Σ|dy||x|; they are
        independent of each other's in the sums Σₖ w c G + b Σ dy and Σₙ w r G.
        """
        x, w, b, dy, r, c = self._at_kept(dy, r, c)
        g = dy.abs().t() @ x.abs()
        dr = ((w * c * g).square().sum(1) + (b * dy.abs().sum(0)).square()).sqrt()
        dc = (w * r[:, None] * g).square().sum(0).sqrt()
        return self._to_logits(dr, dc, r, c)

    def products(self, dy: Tensor, r: Tensor, c: Tensor) -> list[Tensor]:
        """Return the sums of absolute products behind y, dx and dw."""
        x, w, _, dy, r, c = (t.abs() for t in self._at_kept(dy, r, c))
        return [(x * c) @ w.t() * r, (dy * r) @ w * c, (dy * r).t() @ (x * c)]

    def folded(self, r: Tensor, c: Tensor) -> Case:
        """Return the case with r w c and r b as folding stores them, over r and c again."""
        r = r.new_ones(self.w.shape[0]) if self.row_logits is None else r
        c = c.new_ones(self.w.shape[1]) if self.column_logits is None else c

        def over(stored: Tensor, gate: Tensor, value: Tensor) -> Tensor:
            return torch.where(gate == 0, value.double(), stored.to(value.dtype).double() / gate)

        w = over(self.w.float() * r[:, None] * c, r.double()[:, None] * c.double(), self.w)
        b = None if self.b is None else over(self.b.float() * r, r.double(), self.b)
        return replace(self, w=w, b=b)

    def by_division(
        self, dy: Tensor, y: Tensor, dx: Tensor, r: Tensor, c: Tensor
    ) -> list[Tensor | None]:
        """Return both sides' gradients from y and dx as stored: dr = Σ dy y / r, dc = Σ x dx / c.

        Closed gates have no quotient, and theirs is by definition.
        """
        x, w, b, dy2, r2, c2 = self._at_kept(dy, r, c)
        y2 = y.reshape(dy2.shape[0], self.size[0])[:, _positions(self.rows)].double()
        dx2 = dx.reshape(x.shape[0], self.size[1])[:, _positions(self.columns)].double()
        v, u = (x * c2) @ w.t() + b, (dy2 * r2) @ w
        dr = (dy2 * torch.where(r2 == 0, v, y2 / r2)).sum(0)
        dc = (x * torch.where(c2 == 0, u, dx2 / c2)).sum(0)
        return self._to_logits(dr, dc, r2, c2)

    def _at_kept(self, dy: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """Return x, w, b, dy, r and c in fp64 at the kept features, tokens in one dimension."""
        n, k = self.size
        rows, columns = _positions(self.rows), _positions(self.columns)
        compact = self.call().compact
        r = self.x.new_ones(n) if compact or self.row_logits is None else r
        c = self.x.new_ones(k) if compact or self.column_logits is None else c
        b = self.w.new_zeros(self.w.shape[0]) if self.b is None else self.b
        tokens = math.prod(self.x.shape[:-1])
        x2, dy2 = self.x.reshape(tokens, k)[:, columns], dy.reshape(tokens, n)[:, rows]
        x2, w, b, dy2, r, c = (t.double() for t in (x2, self.w, b, dy2, r[rows], c[columns]))
        return x2, w, b, dy2, r, c

    def _at_features(self, kept: Tensor, index: Tensor | None, size: int) -> Tensor:
        out = kept.new_zeros(*kept.shape[:-1], size)
        out[..., _positions(index)] = kept
        return out

    def _to_logits(self, dr: Tensor, dc: Tensor, r: Tensor, c: Tensor) -> list[Tensor | None]:
        """Return the gradients of both sides' logits from those of the kept gates."""
        noise, (distribution, *scalars, closed) = self.seed is not None, self.constants
        tail = (distribution, *scalars, closed or self.call().compact)
        sides: list[Tensor | None] = []
        for dz, z, logits, layout, index, size in (
            (dr, r, self.row_logits, self.row_layout, self.rows, self.size[0]),
            (dc, c, self.column_logits, self.column_layout, self.columns, self.size[1]),
        ):
            if logits is None:
                sides.append(None)
                continue
            dz, z = (self._at_features(t, index, size) for t in (dz, z))
            sides.append(
                reference.gate_logit_gradient(dz, z, logits.double(), noise, layout, *tail)
            )
        return sides


def _positions(index: Tensor | None) -> Any:
    return slice(None) if index is None else index.long()


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


def in_order(case: Case, compact: int = 0) -> Case:
    """Put the closed gates of a case last; a multiple of ``compact`` > 0 leaves out all but open.

    What is open beyond the multiple is closed.
    """
    sides = []
    for logits in (case.row_logits, case.column_logits):
        shut = logits <= case.config.closing_logit
        order = torch.argsort(shut.int(), stable=True)
        if compact:
            count = int((~shut).sum()) // compact * compact
            logits[order[count:]] = -1.0
            order = order[:count]
        sides.append(order)
    rows, columns = sides
    case.w, case.b = case.w[rows][:, columns].contiguous(), case.b[rows]
    case.rows, case.columns = rows.int(), columns.int()
    return case


def check(case: Case, how: tuple[Callable[..., Any], ...], mask: list[bool]) -> None:
    """Compare y and the wanted gradients with fp64, beside plain PyTorch at the same dtype."""
    forward, backward = how
    y, r, c = forward(case.call())
    _, plain_r, plain_c = reference.gated_matmul(case.call())
    torch.testing.assert_close(r, plain_r, atol=2e-6, rtol=0)
    torch.testing.assert_close(c, plain_c, atol=2e-6, rtol=0)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    exact_y, exact = case.exact(dy, r, c)
    stored_y, stored = exact_y, list(exact)
    magnitude_y, *magnitudes = [0.0] * (1 + len(NAMES))
    if case.x.is_cuda and case.x.dtype == torch.float32:
        # Where rows and columns are few cuBLAS splits a product's sums, which then err less.
        magnitude_y, magnitudes[0], magnitudes[1] = map(_largest, case.products(dy, r, c))
    dx = exact[0]
    if how is FOLD:
        stored_y, (stored[0], *_) = case.folded(r, c).exact(dy, r, c)
        dx = backward(case.call(), dy, y, r, c, ONLY_DX)[0]
    elif r.numel() and not case.call().compact:
        dx = case.exact(dy * r.to(dy.dtype), torch.ones_like(r), c)[1][0]  # dy ⊙ r enters rounded
    if how is FUSED and mask[1]:
        # A trained weight's kernel sums over G = dyᵀ x for dr and dc, plain over dy ⊙ y and x ⊙ u.
        for side, sums in enumerate(case.magnitudes(dy, r, c), 3):
            magnitudes[side] = _largest(sums)
    else:
        stored[3:] = case.by_division(dy, y, dx, r, c)
    plain_y = plain_forward(case, r, c)
    assert_no_worse(y, plain_y, exact_y, magnitude_y, stored_y)
    grads = backward(case.call(), dy, y, r, c, mask)
    plain = reference.gated_matmul_backward(case.call(), dy, plain_y, r, c, mask)
    for name, ours, theirs, true, magnitude, at_stored, wanted in zip(
        NAMES, grads, plain, exact, magnitudes, stored, mask, strict=True
    ):
        if not wanted or true is None:
            assert ours.numel() == 0, name
            continue
        ours, theirs = ours.reshape(true.shape), theirs.reshape(true.shape)
        assert_no_worse(ours, theirs, true, magnitude, at_stored)


def _largest(sums: Tensor | None) -> float:
    return sums.max().item() if sums is not None and sums.numel() else 0.0


def plain_forward(case: Case, r: Tensor, c: Tensor) -> Tensor:
    """Return y by elementwise passes around a Linear, for the gates r and c."""
    n, k = case.size
    x, y = case.x, case.x.new_zeros(*case.x.shape[:-1], n)
    rows, columns = _positions(case.rows), _positions(case.columns)
    if not case.call().compact:
        x = x if case.column_logits is None else x * c.to(x.dtype)
        row = None if case.row_logits is None else r[rows].to(x.dtype)
    else:
        row = None
    y[..., rows] = reference.gated_linear(x[..., columns], case.w, case.b, row, None)
    return y
