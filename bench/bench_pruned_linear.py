"""A pruned layer against dense, against every packed library GEMM, and against the ceilings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import (
    TORCH_DTYPES,
    Case,
    add_peers,
    check,
    interleave,
    last_level_cache,
    make_case,
    medians,
)
from peers import COMPILERS, RUNTIMES
from shapes import (
    BATCHES,
    COLD_BYTES,
    COLD_LAYERS,
    COLD_REMOVED,
    COMPILED_BATCHES,
    COMPILED_LAYERS,
    DTYPES,
    LAYERS,
    REMOVED,
    SWEEP,
)

from finegates import _native
from finegates.ops import _cpu
from finegates.report.ceilings import peak_flops, read_bandwidth


def report(
    benchmark: Any, case: Case, dtype: str, threads: int, seconds: float = 0.6
) -> dict[str, float]:
    """Run the gate and the interleaved clock, keep the numbers and return the medians, seconds."""
    check(case)
    samples = interleave(case.candidates, seconds)
    time = medians(samples)
    fastest = {name: min(times) for name, times in samples.items()}
    dense = min((name for name in time if name.startswith("dense")), key=time.__getitem__)
    library = min((n for n in time if n != "ours" and not n.startswith("dense")), key=time.get)
    benchmark.extra_info.update(
        {
            "isa": _native.isa(),
            "threads": threads,
            "microseconds": {name: 1e6 * t for name, t in time.items()},
            "minimum_microseconds": {name: 1e6 * t for name, t in fastest.items()},
            "absent": case.absent,
            "dense_ratio": time["dense"] / time["ours"],
            "fastest_dense": dense,
            "fastest_dense_ratio": time[dense] / time["ours"],
            "library": library,
            "library_ratio": time[library] / time["ours"],
            "gflops": case.flops / time["ours"] / 1e9,
            "weight_gbytes_per_second": case.weight_bytes / time["ours"] / 1e9,
            **shares(case, dtype, threads, time["ours"]),
        }
    )
    benchmark.pedantic(case.candidates["ours"], rounds=5, iterations=1, warmup_rounds=0)
    return time


def shares(case: Case, dtype: str, threads: int, seconds: float) -> dict[str, float]:
    """Return the shares of this machine's ceilings that a call reaches, of those that it has.

    That is the arithmetic peak, which no probe measures at the generic level, and, at M = 1, the
    bandwidth where the weight exceeds the last-level cache.
    """
    found = {}
    if len(case.x) == 1 and case.weight_bytes > last_level_cache():
        read = read_bandwidth(256, threads)
        found["share_of_read_bandwidth"] = case.weight_bytes / seconds / read
        found["read_gbytes_per_second"] = read / 1e9
    if _native.isa() != "generic":
        peak = peak_flops(TORCH_DTYPES[dtype], threads)
        found["share_of_peak"] = case.flops / seconds / peak
        found["peak_gflops"] = peak / 1e9
    return found


@pytest.mark.benchmark(group="grid")
@pytest.mark.parametrize("m", BATCHES, ids=lambda m: f"M{m}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def bench_grid(benchmark: Any, layer: str, dtype: str, m: int, threads: int) -> None:
    case = make_case(layer, dtype, m, REMOVED)
    add_peers(case, RUNTIMES)
    benchmark.extra_info.update({"layer": layer, "dtype": dtype, "m": m, "removed": REMOVED})
    report(benchmark, case, dtype, threads)


@pytest.mark.benchmark(group="compiled")
@pytest.mark.parametrize("m", COMPILED_BATCHES, ids=lambda m: f"M{m}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", COMPILED_LAYERS)
def bench_compiled(benchmark: Any, layer: str, dtype: str, m: int, threads: int) -> None:
    """A part of the grid against compilers too: each shape takes them seconds."""
    case = make_case(layer, dtype, m, REMOVED)
    add_peers(case, COMPILERS)
    benchmark.extra_info.update({"layer": layer, "dtype": dtype, "m": m, "removed": REMOVED})
    time = report(benchmark, case, dtype, threads, seconds=0.4)
    benchmark.extra_info["compiled_ratio"] = time["compiled"] / time["ours"]
    benchmark.extra_info["compiled_dense_ratio"] = time["dense compiled"] / time["ours"]


@pytest.mark.benchmark(group="removed")
@pytest.mark.parametrize("m", BATCHES, ids=lambda m: f"M{m}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layer", "removed"), SWEEP)
def bench_removed(
    benchmark: Any, layer: str, dtype: str, m: int, removed: float, threads: int
) -> None:
    case = make_case(layer, dtype, m, removed)
    benchmark.extra_info.update({"layer": layer, "dtype": dtype, "m": m, "removed": removed})
    report(benchmark, case, dtype, threads, seconds=0.2)


@pytest.mark.benchmark(group="cold")
@pytest.mark.parametrize("removed", COLD_REMOVED)
@pytest.mark.parametrize("m", BATCHES, ids=lambda m: f"M{m}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", COLD_LAYERS)
def bench_cold(
    benchmark: Any, layer: str, dtype: str, m: int, removed: float, threads: int
) -> None:
    """Weights that are never in cache: each call takes the next of many copies."""
    case = make_case(layer, dtype, m, removed)
    check(case)
    copies = COLD_BYTES // case.weight_bytes + 1
    packed = [case.packed.clone() for _ in range(copies)]
    dense = [case.weight.clone() for _ in range(copies)]
    at = {"ours": 0, "dense": 0}

    def ours() -> torch.Tensor:
        at["ours"] = (at["ours"] + 1) % copies
        return _cpu.pruned_linear(case.x, packed[at["ours"]], case.out_features)

    def plain() -> torch.Tensor:
        at["dense"] = (at["dense"] + 1) % copies
        return torch.nn.functional.linear(case.x, dense[at["dense"]], case.bias)

    time = medians(interleave({"ours": ours, "dense": plain}, 0.4))
    if m == 1:
        read = read_bandwidth(256, threads)
        share = case.weight_bytes / time["ours"] / read
        benchmark.extra_info["share_of_read_bandwidth"] = share
        benchmark.extra_info["read_gbytes_per_second"] = read / 1e9
    benchmark.extra_info.update(
        {
            "layer": layer,
            "dtype": dtype,
            "m": m,
            "removed": removed,
            "threads": threads,
            "isa": _native.isa(),
            "microseconds": {name: 1e6 * t for name, t in time.items()},
            "dense_ratio": time["dense"] / time["ours"],
            "cycle_megabytes": copies * case.weight_bytes >> 20,
            "weight_gbytes_per_second": case.weight_bytes / time["ours"] / 1e9,
        }
    )
    benchmark.pedantic(ours, rounds=5, iterations=1)
