"""The GPU benchmarks, run dry: every line once, on a CPU, with the kernels interpreted."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "providers", "count"),
    [
        ("bench_gated_linear.py", {"frozen", "naive", "compiled", "finegates"}, 18),
        ("gpu_pruned_linear.py", {"dense", "torch", "finegates"}, 6),
    ],
)
def test_dry_run(script: str, providers: set[str], count: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    output = tmp_path / "out.csv"
    command = [sys.executable, str(BENCH / script), "--dry-run", "--output", str(output)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCH.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    assert providers <= {row["kernel_provider"] for row in rows}
    assert {"kernel_name", "kernel_operation_mode", "metric_name", "y_value_50"} <= set(rows[0])
    assert all(row["gpu_name"] == "dry run on a CPU" for row in rows)


@pytest.mark.parametrize("script", ["bench_gated_linear.py", "gpu_pruned_linear.py"])
def test_without_a_gpu_it_says_so(script: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(BENCH.parent)}
    command = [sys.executable, str(BENCH / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no GPU here" in done.stderr
