"""One layer of the GPU's training benchmark: its operands, the ways to run it, and their check."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from shapes import CLOSED, REMOVED
from torch import Tensor

from finegates import GateConfig
from finegates.nn import Held
from finegates.ops import _triton_gated, alignment, gated_matmul, reference
from finegates.ops.gated_call import GatedCall
from finegates.surgery.shrink import held_of
from numerics import assert_no_worse

LEAVES = ("x", "w", "b", "row_logits", "column_logits")
CERTAIN = 20.0  # a logit whose sign no noise changes


@dataclass(frozen=True)
class Layer:
    """The operands of a step; what requires a gradient is what it trains.

    ``laid_out`` is w as the op takes it: in the order of rows and columns, or only those.
    ``living`` is 0 for rows of it that only fill up their number, as `FusedGatedLinear` does.
    """

    x: Tensor
    w: Tensor
    b: Tensor | None
    row_logits: Tensor
    column_logits: Tensor
    dy: Tensor
    config: GateConfig
    laid_out: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None
    living: Tensor | None = None
    kept: float = 1.0

    @property
    def trained(self) -> dict[str, Tensor]:
        """The leaves that get a gradient, by the op's names."""
        leaves = {name: getattr(self, name) for name in LEAVES}
        return {name: t for name, t in leaves.items() if t is not None and t.requires_grad}

    def seed(self) -> Tensor | None:
        """Draw the keys of the noise, as `FusedGatedLinear` does at every forward."""
        if self.config.distribution == "ranking":
            return None
        return torch.randint(0, 2**31 - 1, (2,), device=self.x.device)

    def gated(self, seed: Tensor | None = None) -> Tensor:
        """Ours: gates sampled inside the op."""
        b = self.b
        if b is not None:
            b = Held(self.rows, self.living).part(b, 0)
        return gated_matmul(
            self.x, self.laid_out, b, self.row_logits, self.column_logits,
            self.seed() if seed is None else seed,
            self.config.distribution, self.config.constants,
            rows=self.rows, columns=self.columns, out_features=self.w.shape[0], backend="triton",
        )  # fmt: skip

    def plain(self) -> Tensor:
        """A Linear without gates."""
        return F.linear(self.x, self.w, self.b)

    def naive(self) -> Tensor:
        """Gates by elementwise passes."""
        return naive(self.x, self.w, self.b, self.row_logits, self.column_logits, self.config)

    def call(self, seed: Tensor | None, dtype: torch.dtype) -> GatedCall:
        """Return the whole layer as the ops take it, in another dtype, without index maps."""
        (n, k), wide = self.w.shape, torch.promote_types(dtype, torch.float32)
        x, w, b = (None if t is None else t.detach().to(dtype) for t in (self.x, self.w, self.b))
        logits = (t.detach().to(wide) for t in (self.row_logits, self.column_logits))
        law = (self.config.distribution, *self.config.constants)
        return GatedCall(x, w, b, *logits, seed, None, None, n, [n, n], [k, k], *law, False)

    def drawn(self, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return r and c in fp32, as the op draws them for a seed."""
        call = self.call(seed, self.x.dtype)
        _, r, c = torch.ops.finegates.gated_matmul.default(*call, "triton")
        return r, c

    def by_reference(
        self, seed: Tensor | None, r: Tensor, c: Tensor, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Return y and the gradients of `trained` by the reference in a dtype, for given gates."""
        call, dy = self.call(seed, dtype), self.dy.to(dtype)
        r, c = (z.to(call.row_logits.dtype) for z in (r, c))
        y = reference.gated_linear(call.x, call.w, call.b, r.to(dtype), c.to(dtype))
        mask = [name in self.trained for name in LEAVES]
        grads = reference.gated_matmul_backward(call, dy, y, r, c, mask)
        return {"y": y, **dict(zip(LEAVES, grads, strict=True))}


def naive(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    row_logits: Tensor,
    column_logits: Tensor,
    config: GateConfig,
) -> Tensor:
    """The authors' way: sample with torch ops, multiply x and y elementwise."""
    r, c = (_sample(logits, config).to(x.dtype) for logits in (row_logits, column_logits))
    return F.linear(x * c, w, b) * r


def _sample(logits: Tensor, config: GateConfig) -> Tensor:
    shift, scale, beta = config.constants
    if config.distribution == "gaussian":
        z = torch.tanh(logits) + shift + scale * torch.randn_like(logits)
    else:
        u = torch.rand_like(logits).clamp(1e-6, 1.0 - 1e-6)
        z = shift + scale * torch.sigmoid((torch.logit(u) + logits) / beta)
    return z.clamp(0.0, 1.0)


def compiled(layer: Layer, backend: str) -> partial[Tensor]:
    """Return the naive gates compiled for this layer alone.

    What other layers compiled is forgotten first, so that no recompile limit sends this one back to
    eager. Run it where `torch._dynamo.config.error_on_recompile` is set.
    """
    torch.compiler.reset()
    run = torch.compile(naive, backend=backend, dynamic=False, fullgraph=True)
    operands = (layer.x, layer.w, layer.b, layer.row_logits, layer.column_logits)
    return partial(run, *operands, layer.config)


@contextmanager
def chosen(way: str) -> Iterator[None]:
    """Take the choice between ``"fused"`` and ``"fold"`` by hand; ``"auto"`` leaves it alone."""
    if way == "auto":
        yield
        return
    reason = "the benchmark wants the other one"
    answer = (None, reason) if way == "fused" else (reason, None)
    choose, _triton_gated._fold_wins = _triton_gated._fold_wins, lambda *_: answer
    try:
        yield
    finally:
        _triton_gated._fold_wins = choose


@dataclass(frozen=True)
class Provider:
    """One way to run a layer, forward and as a step."""

    layer: Layer
    run: Callable[[], Tensor]
    way: str = "auto"

    def forward(self) -> Tensor:
        """Return y, with its autograd graph."""
        with chosen(self.way):
            return self.run()

    def step(self) -> tuple[Tensor | None, ...]:
        """Run forward and backward to everything that is trained."""
        layer = self.layer
        with chosen(self.way):
            return torch.autograd.grad(
                self.run(), list(layer.trained.values()), layer.dy, allow_unused=True
            )

    def check(self, name: str) -> None:
        """Compare y and every gradient of our op with fp64 at the gates that it draws."""
        layer, seed = self.layer, self.layer.seed()
        with chosen(self.way):
            y = layer.gated(seed)
            grads = torch.autograd.grad(y, list(layer.trained.values()), layer.dy)
            r, c = layer.drawn(seed)
        ours = {"y": y.detach(), **dict(zip(layer.trained, grads, strict=True))}
        exact, plain = (layer.by_reference(seed, r, c, t) for t in (torch.float64, layer.x.dtype))
        for what, value in ours.items():
            try:
                assert_no_worse(value, plain[what], exact[what])
            except AssertionError as error:
                raise AssertionError(f"{name}: {what}: {error}") from error


def make(
    shape: tuple[int, int, bool], m: int, dtype: torch.dtype, config: GateConfig, device: str
) -> Layer:
    """Draw a layer with a frozen weight, its gates near the opening edge."""
    n, k, bias = shape
    g = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    w = (draw(n, k) / k**0.5).to(dtype)
    return Layer(
        x=draw(m, k).to(dtype).requires_grad_(),
        w=w,
        b=draw(n).to(dtype).requires_grad_() if bias else None,
        row_logits=(config.start_logit + 0.3 * draw(n)).requires_grad_(),
        column_logits=(config.start_logit + 0.3 * draw(k)).requires_grad_(),
        dy=draw(m, n).to(dtype),
        config=config,
        laid_out=w,
    )


def ordered(layer: Layer, closed: float) -> Layer:
    """Return the layer with that share of each side's gates closed, and w with those last."""
    sides = [_open_and_closed(size, round(size * (1.0 - closed)), layer) for size in layer.w.shape]
    order = [torch.cat(side).int() for side in sides]
    row, column = (
        logits.detach().index_fill(0, shut, -CERTAIN).requires_grad_()
        for logits, (_, shut) in zip((layer.row_logits, layer.column_logits), sides, strict=True)
    )
    return replace(
        layer, row_logits=row, column_logits=column, rows=order[0], columns=order[1],
        laid_out=layer.w.detach()[order[0]][:, order[1]].contiguous(),
        kept=math.prod(opened.numel() for opened, _ in sides) / layer.w.numel(),
    )  # fmt: skip


def compact(layer: Layer, removed: float = REMOVED) -> Layer:
    """Return the layer with ranking gates that close that share of w, and only the rest of w.

    Filled up as `shrink_` does it.
    """
    counts = [round(size * math.sqrt(1.0 - removed)) for size in layer.w.shape]
    row, column = (
        torch.full_like(logits.detach(), -1.0)
        .index_fill(0, _open_and_closed(len(logits), count, layer)[0], 1.0)
        .requires_grad_()
        for logits, count in zip((layer.row_logits, layer.column_logits), counts, strict=True)
    )
    rows, columns = (held_of(z > 0, alignment(z.device)) for z in (row, column))
    return replace(
        layer, config=GateConfig(distribution="ranking"), row_logits=row, column_logits=column,
        rows=rows.features, columns=columns.features, living=rows.living,
        laid_out=columns.part(rows.part(layer.w.detach(), 0), 1),
        kept=math.prod(counts) / layer.w.numel(),
    )  # fmt: skip


def _open_and_closed(size: int, count: int, layer: Layer) -> tuple[Tensor, Tensor]:
    """Return ``count`` features of a side picked at random, and the others, each sorted."""
    device = layer.w.device
    g = torch.Generator(device).manual_seed(size)
    opened, shut = torch.randperm(size, generator=g, device=device).split([count, size - count])
    return opened.sort().values, shut.sort().values


def trained(layer: Layer) -> Layer:
    """Return the layer with a weight that is trained too, as in pretraining."""
    w = layer.w.detach().requires_grad_()
    return replace(layer, w=w, laid_out=w)


def providers(layer: Layer, backend: str) -> dict[str, Provider]:
    """Return all ways to run a layer by name; ``finegates`` in the name means that it is ours."""
    pretrained, shrunk = trained(layer), compact(layer)
    ways: dict[str, Provider] = {
        "frozen": Provider(layer, layer.plain),
        "naive": Provider(layer, layer.naive),
        "compiled": Provider(layer, compiled(layer, backend)),
        "finegates": Provider(layer, layer.gated),
        "finegates-fused": Provider(layer, layer.gated, "fused"),
        "finegates-fold": Provider(layer, layer.gated, "fold"),
        f"finegates-compact-{REMOVED:.0%}": Provider(shrunk, shrunk.gated),
        "trained": Provider(pretrained, pretrained.plain),
        "finegates-trained": Provider(pretrained, pretrained.gated),
    }
    for share in CLOSED:
        in_order = ordered(layer, share)
        ways[f"finegates-ordered-{share:.0%}"] = Provider(in_order, in_order.gated)
    return ways
