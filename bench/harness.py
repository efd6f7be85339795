"""Layers, baselines and the interleaved clock that every suite shares."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from shapes import LAYERS, kept
from torch import Tensor

from finegates.ops import _cpu
from finegates.report import timing

# What --clock says: wall time, or the calling thread's own, which other processes stretch less.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}
clock: Callable[[], float] = time.perf_counter

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Case:
    """A dense layer, its pruned form and everything a user could run instead."""

    out_features: int
    in_features: int
    rows: Tensor
    columns: Tensor
    weight: Tensor
    bias: Tensor
    compact_weight: Tensor
    compact_bias: Tensor
    packed: Tensor
    x: Tensor
    compact_x: Tensor
    candidates: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        return 2 * self.compact_x.shape[0] * self.compact_weight.numel()

    @property
    def weight_bytes(self) -> int:
        return self.compact_weight.numel() * self.compact_weight.element_size()


def make_case(layer: str | tuple[int, int], dtype: str, m: int, removed: float) -> Case:
    """Build a layer with `removed` of its weight gone, half by rows and half by columns."""
    n, k = LAYERS[layer] if isinstance(layer, str) else layer
    g = torch.Generator().manual_seed(n * 31 + k)
    d = TORCH_DTYPES[dtype]
    rows = torch.randperm(n, generator=g)[: kept(n, removed)].sort().values.int()
    columns = torch.randperm(k, generator=g)[: kept(k, removed)].sort().values.int()
    weight = (torch.randn(n, k, generator=g) / k**0.5).to(d)
    bias = torch.randn(n, generator=g).to(d)
    compact = weight[rows.long()][:, columns.long()].contiguous()
    compact_bias = bias[rows.long()].contiguous()
    packed = _cpu.prepare(compact, compact_bias, rows, columns, n, k)
    x = torch.randn(m, k, generator=g).to(d)
    case = Case(
        n,
        k,
        rows,
        columns,
        weight,
        bias,
        compact,
        compact_bias,
        packed,
        x,
        x[:, columns.long()].contiguous(),
    )
    case.candidates = {
        "ours": lambda: _cpu.pruned_linear(case.x, case.packed, n),
        "dense": lambda: F.linear(case.x, case.weight, case.bias),
        "compact": lambda: F.linear(case.compact_x, compact, compact_bias),
        **_prepacked(case.compact_x, compact, compact_bias),
    }
    return case


def _prepacked(x: Tensor, w: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The libraries' own packed weights, on the already gathered shape."""
    found: dict[str, Callable[[], Tensor]] = {}
    m = x.shape[0]
    if hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        onednn = torch.ops.mkldnn._reorder_linear_weight(w, m)
        found["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, onednn, b, "none", [], "")
    if w.dtype == torch.float32 and torch.backends.mkl.is_available():
        mkl = torch.ops.mkl._mkl_reorder_linear_weight(w, m)
        found["mkl"] = lambda: torch.ops.mkl._mkl_linear(x, mkl, w, b, m)
    return found


def add_compiled(case: Case) -> None:
    """Add torch.compile with freezing on the gathered shape; seconds of compilation a shape."""
    linear = torch.nn.Linear(*reversed(case.compact_weight.shape), dtype=case.x.dtype)
    with torch.no_grad():
        linear.weight.copy_(case.compact_weight)
        linear.bias.copy_(case.compact_bias)
    torch._dynamo.reset()
    compiled = torch.compile(linear.eval(), options={"freezing": True})
    compiled(case.compact_x)
    case.candidates["compiled"] = lambda: compiled(case.compact_x)


def check(case: Case) -> None:
    """Refuse to time a wrong kernel: error at most twice that of plain PyTorch."""
    w, b = case.compact_weight.double(), case.compact_bias.double()
    reference = F.linear(case.compact_x.double(), w, b)
    y = case.candidates["ours"]()
    plain = F.linear(case.compact_x, case.compact_weight, case.compact_bias)
    rows = case.rows.long()
    error = (y[:, rows].double() - reference).abs().max().item()
    allowed = 2 * (plain.double() - reference).abs().max().item()
    removed = torch.ones(case.out_features, dtype=torch.bool)
    removed[rows] = False
    if error > allowed or (y[:, removed] != 0).any():
        raise AssertionError(f"wrong result, not timed: error {error:.2e}, allowed {allowed:.2e}")


def interleave(
    candidates: dict[str, Callable[[], object]], seconds: float, rounds: int = 61
) -> dict[str, list[float]]:
    """Time all candidates in turn by the suite's clock; a sample lasts 100 microseconds or more."""
    return timing.interleave(candidates, seconds, max_rounds=rounds, sample=100e-6, clock=clock)


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in samples.items()}
