"""bench/models.py: one line a work, the lead over the fastest dense runtime, the bars missed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from finegates.report.bench_model import Cell, ModelBench, Result
from finegates.report.work import Work

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "bench" / "models.py"


def result(runtime: str, p50: float | None, threads: int = 1, kind: str = "prefill") -> Result:
    return Result(runtime, Cell("bf16", Work(kind, 1, 16), threads), p50)


def report(tmp_path: Path, shape: str, *results: Result) -> list[str]:
    path = tmp_path / f"{shape}.json"
    bench = ModelBench(shape, 0.2, list(results), [])
    path.write_text(json.dumps(bench.to_dict()))
    assert ModelBench.from_dict(json.loads(path.read_text())) == bench
    command = [sys.executable, str(MODELS), str(path), "--png", str(tmp_path / "all.png")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.check_output(command, text=True, env=environment)
    assert (tmp_path / "all.png").stat().st_size > 1000
    return out.splitlines()


def test_the_lead_is_over_the_fastest_dense_runtime(tmp_path: Path) -> None:
    lines = report(
        tmp_path,
        "minilm",
        result("transformers", 24.0),
        result("OpenVINO", 14.99),
        result("llama.cpp", None),
        result("pruned", 1.0),
        result("optimized", 10.0),
        result("transformers", 4000.0, threads=2),
        result("optimized", 1250.0, threads=2),
    )
    assert lines[0] == "| shape | work | bf16, 1 thread | bf16, 2 threads |"
    assert lines[2] == "| minilm | prefill 1×16 | 10 ms, 1.50× | 1250 ms, 3.20× |"
    cell, *faults = lines[-1].replace(": ", "; ", 1).split("; ")
    assert cell == "* minilm bf16 prefill 1×16 T=1"
    assert faults == [
        "1.499 times the fastest dense, not 1.500",
        "2.400 times transformers, not 2.500",
    ]


def test_a_decoder_has_its_own_bars_and_needs_its_peer(tmp_path: Path) -> None:
    step = [result("llama.cpp", 10.1, kind="decode"), result("optimized", 10.0, kind="decode")]
    assert report(tmp_path, "llama-1b", *step)[-1] == "none"
    prefill = [result("llama.cpp", 16.0), result("optimized", 10.0)]
    faults = report(tmp_path, "llama-1b", *step, *prefill)
    assert faults[-1].endswith("1.600 times the fastest dense, not 1.700")
    alone = [result("transformers", 40.0), result("llama.cpp", None), result("optimized", 10.0)]
    faults = report(tmp_path, "llama-1b", *step, *alone)
    assert faults[-1].endswith(": llama.cpp was not timed")
