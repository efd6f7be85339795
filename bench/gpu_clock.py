"""An interleaved clock for GPUs, Liger's CSV columns, and a dry run on a CPU."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import finegates

# More than the L2 of an H100 (50 MiB) or a B200 (126 MiB): every call starts with cold caches.
FLUSH_BYTES = 256 * 2**20
COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
    "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
    "extra_benchmark_config_str", "gpu_name", "timestamp", "finegates_version", "kept_fraction",
    "ideal",
)  # fmt: skip


def device_name(device: str) -> str:
    """Return the card's name, or the CPU's in a dry run."""
    return torch.cuda.get_device_name() if device == "cuda" else "dry run on a CPU"


def time_interleaved(
    candidates: dict[str, Callable[[], Any]], device: str, repeats: int
) -> dict[str, tuple[float, float, float]]:
    """Return milliseconds (p50, p20, p80) of each candidate, all in turn, caches flushed."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    if device == "cpu":
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            samples[name] = [1e3 * (time.perf_counter() - start)] * 2
    else:
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        for run in candidates.values():
            for _ in range(3):
                run()
        for _ in range(repeats):
            events = []
            for name, run in candidates.items():
                flush.zero_()
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                run()
                last.record()
                events.append((name, first, last))
            torch.cuda.synchronize()
            for name, first, last in events:
                samples[name].append(first.elapsed_time(last))
    return {name: _quantiles(values) for name, values in samples.items()}


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[3]


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Return the peak of allocated memory during one call, above what was there before."""
    if device == "cpu":
        run()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def graphed(run: Callable[[], Tensor], device: str) -> Callable[[], Any]:
    """Return a replay of ``run`` captured in a CUDA graph."""
    if device == "cpu":
        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def row(
    name: str,
    provider: str,
    mode: str,
    metric: str,
    unit: str,
    x: tuple[str, str, int],
    y: tuple[float, float, float],
    config: str,
    device: str,
    kept: float = 1.0,
    ideal: float = 1.0,
) -> dict[str, Any]:
    """Return one CSV row."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    values = (
        name, provider, mode, metric, unit, *x, *y, config, device_name(device), stamp,
        finegates.__version__, kept, ideal,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows, and the folder they go to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def assert_correct(name: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Refuse to time a wrong kernel: error at most twice that of plain PyTorch at its dtype."""
    error = (ours.double() - exact.double()).abs().max().item()
    allowed = 2.0 * (plain.double() - exact.double()).abs().max().item()
    allowed += torch.finfo(plain.dtype).eps * exact.abs().max().item()
    if not error <= allowed:
        raise AssertionError(f"{name} is wrong, not timed: error {error:.2e} above {allowed:.2e}")
