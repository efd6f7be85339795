"""Layers, baselines and the interleaved clock that every suite shares."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from shapes import LAYERS, kept
from torch import Tensor

from finegates.ops import _cpu
from finegates.report import timing
from numerics import assert_no_worse

# What --clock says: wall time, or the calling thread's own, which other processes stretch less.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}
clock: Callable[[], float] = time.perf_counter

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def last_level_cache() -> int:
    """Return the last-level cache's bytes as Linux tells them, 0 where it does not."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return 1024 * int(path.read_text().strip().rstrip("K")) if path.exists() else 0


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
    absent: dict[str, str] = field(default_factory=dict)  # libraries not timed, and why

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
    }
    _add_prepacked(case)
    return case


def _add_prepacked(case: Case) -> None:
    """Add the libraries' own packed weights, on the already gathered shape."""
    x, w, b = case.compact_x, case.compact_weight, case.compact_bias
    m = x.shape[0]
    if hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        try:
            onednn = torch.ops.mkldnn._reorder_linear_weight(w, m)
        except RuntimeError as error:  # bf16 below AVX-512
            case.absent["onednn"] = _one_line(error)
        else:
            case.candidates["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(
                x, onednn, b, "none", [], ""
            )
    if w.dtype == torch.float32 and torch.backends.mkl.is_available():
        mkl = torch.ops.mkl._mkl_reorder_linear_weight(w, m)
        case.candidates["mkl"] = lambda: torch.ops.mkl._mkl_linear(x, mkl, w, b, m)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def add_peers(case: Case, makers: dict[str, Callable[..., Callable[[], Tensor]]]) -> None:
    """Add other runtimes on the gathered shape and, as ``dense <name>``, on the whole layer."""
    gathered = (case.compact_x, case.compact_weight, case.compact_bias)
    whole = (case.x, case.weight, case.bias)
    for name, make in makers.items():
        try:
            with warnings.catch_warnings(action="ignore"):
                case.candidates[name] = make(*gathered)
                case.candidates[f"dense {name}"] = make(*whole)
        except (ImportError, NotImplementedError, RuntimeError) as error:
            case.absent[name] = _one_line(error)


def check(case: Case) -> None:
    """Refuse to time a wrong kernel, and leave out a library's wrong result with the reason.

    Ours obeys the tests' rule: error at most twice that of plain PyTorch. A library may sum all K
    products in one chain, whose rounding grows by √K.
    """
    rows = case.rows.long()
    gathered = (case.compact_x, case.compact_weight, case.compact_bias)
    y = case.candidates["ours"]()
    removed = torch.ones(case.out_features, dtype=torch.bool)
    removed[rows] = False
    assert (y[:, removed] == 0).all(), "a removed output is not 0"
    plain, exact = F.linear(*gathered), F.linear(*(t.double() for t in gathered))
    magnitude = F.linear(gathered[0].abs(), gathered[1].abs()).max().item()
    assert_no_worse(y[:, rows], plain, exact, magnitude)
    chain = case.in_features**0.5
    # The last rows tell a wrong GEMM as well as all of them would.
    x = case.x[-16:]
    dense = F.linear(x.double(), case.weight.double(), case.bias.double())
    plain_dense = F.linear(x, case.weight, case.bias)
    for name in [n for n in case.candidates if n not in ("ours", "dense", "compact")]:
        y = case.candidates[name]()
        try:
            if name.startswith("dense"):
                assert_no_worse(y[-16:], plain_dense, dense, chain * magnitude)
            else:
                assert_no_worse(y, plain, exact, chain * magnitude)
        except AssertionError as error:
            case.absent[name] = f"wrong result, not timed: {error}"
            del case.candidates[name]


def interleave(
    candidates: dict[str, Callable[[], object]], seconds: float, rounds: int = 61
) -> dict[str, list[float]]:
    """Time all candidates in turn by the suite's clock; a sample lasts 100 microseconds or more.

    With several threads each waits for the last one's to sleep: every runtime has a pool of its
    own, which spins for a while on cores that the next one needs.
    """
    settle = 3e-3 if torch.get_num_threads() > 1 else 0.0
    return timing.interleave(
        candidates, seconds, max_rounds=rounds, sample=100e-6, settle=settle, clock=clock
    )


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in samples.items()}
