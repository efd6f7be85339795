"""An interleaved clock for GPUs, CUDA graphs, a memory meter and Liger's CSV columns."""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_stand_in
import torch
from torch import Tensor

import finegates

RESULTS = Path(__file__).parent / "results" / "gpu"
# More than the L2 of an H100 (50 MiB) or a B200 (126 MiB): every call starts with cold caches.
FLUSH_BYTES = 256 * 2**20
COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
    "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
    "extra_benchmark_config_str", "gpu_name", "timestamp", "finegates_version", "kept_fraction",
    "ideal",
)  # fmt: skip


class Clock:
    """Times, memory and graphs of functions of nothing, on one device.

    Args:
        dry_run: run the same lines on a CPU, with `gpu_stand_in` for ``torch.cuda``.
    """

    def __init__(self, dry_run: bool = False) -> None:
        self.cuda: Any = gpu_stand_in if dry_run else torch.cuda
        self.device = "cpu" if dry_run else "cuda"
        self.name: str = self.cuda.get_device_name()
        self.warmups = 1 if dry_run else 3
        size = 1 if dry_run else FLUSH_BYTES
        self._flush = torch.empty(size, dtype=torch.int8, device=self.device)

    def graphed(self, run: Callable[[], Any]) -> Callable[[], None]:
        """Return the replay of ``run`` captured in a CUDA graph, its backward included."""
        cuda = self.cuda
        current, side = cuda.current_stream(), cuda.Stream()
        side.wait_stream(current)
        with cuda.stream(side):
            for _ in range(self.warmups):
                run()
        current.wait_stream(side)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            run()
        replay: Callable[[], None] = graph.replay
        return replay

    def device_time(self, run: Callable[[], Any]) -> float:
        """Return milliseconds of one call on the device, from cold caches."""
        first, last = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        first.record()
        run()
        last.record()
        self.cuda.synchronize()
        return float(first.elapsed_time(last))

    def wall_time(self, run: Callable[[], Any]) -> float:
        """Return milliseconds of one call as the host sees it: its own work and all waiting."""
        self._flush.zero_()
        self.cuda.synchronize()
        start = time.perf_counter()
        run()
        self.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def interleaved(
        self,
        candidates: dict[str, Callable[[], Any]],
        measure: Callable[[Callable[[], Any]], float],
        repeats: int,
    ) -> dict[str, tuple[float, float, float]]:
        """Return ``measure`` of each candidate, all in turn: p50, p20 and p80."""
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        for run in candidates.values():
            for _ in range(self.warmups):
                run()
        for _ in range(repeats):
            for name, run in candidates.items():
                samples[name].append(measure(run))
        return {name: _quantiles(values) for name, values in samples.items()}

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """Return the peak of allocated memory during one call, above what was there before."""
        run()
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        run()
        self.cuda.synchronize()
        return int(self.cuda.max_memory_allocated() - before)

    def held_bytes(self, forward: Callable[[], Tensor]) -> int:
        """Return the bytes of the tensors that one forward leaves, its output and graph held.

        As requested: what the allocator hands out is whole blocks, whose rest depends on its past.
        """
        forward()  # cuBLAS keeps a workspace from its first call
        self.cuda.synchronize()
        before = self._requested()
        held = forward()
        self.cuda.synchronize()
        after = self._requested()
        del held
        return after - before

    def _requested(self) -> int:
        return int(self.cuda.memory_stats()["requested_bytes.all.current"])


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[3]


def row(
    name: str,
    provider: str,
    mode: str,
    metric: str,
    unit: str,
    x: tuple[str, str, int],
    y: tuple[float, float, float],
    config: str,
    device_name: str,
    kept: float = 1.0,
) -> dict[str, Any]:
    """Return one CSV row; ``kept`` is the share of w in rows and columns that are open."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    values = (
        name, provider, mode, metric, unit, *x, *y, config, device_name, stamp,
        finegates.__version__, kept, 1.0 / kept,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def folder_of(name: str) -> Path:
    """Return where the results of a card lie."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower())


class Report:
    """A CSV of rows, and beside it as ``.txt`` what was printed: the verdicts.

    Args:
        output: the CSV's path; by default table in ``bench/results/gpu``, in a folder of the card.
        name: the card's name.
        table: file name of the CSV.
    """

    def __init__(self, output: Path | None, name: str, table: str) -> None:
        self.csv = output or folder_of(name) / table
        self.text = self.csv.with_suffix(".txt")
        self.name = name
        self.rows: list[dict[str, Any]] = []
        self.csv.parent.mkdir(parents=True, exist_ok=True)
        self.text.write_text("")

    def say(self, line: str) -> None:
        """Print a line and keep it."""
        sys.stdout.write(f"{line}\n")
        with self.text.open("a") as file:
            file.write(f"{line}\n")

    def write(self) -> None:
        """Write the rows so far: a run that dies later keeps them."""
        with self.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def end(self) -> None:
        """Say what there is and where."""
        self.say(f"{len(self.rows)} rows of {self.name} in {self.csv.name}")


def command_line(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """Return what the command line of every GPU table takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--repeats", type=_several, default=repeats)
    parser.add_argument("--output", type=Path, help="CSV; default: bench/results/gpu/CARD/")
    return parser


def _several(text: str) -> int:
    """Return a number of repeats that has quantiles."""
    count = int(text)
    if count < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {count}")
    return count


def main(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> int:
    """Parse the command line and run; refuses without a GPU, other than dry."""
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.stderr.write("no GPU here; --dry-run runs the same lines on a CPU\n")
        return 2
    return run(arguments)
