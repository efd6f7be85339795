"""bench/models.py: one line a work, the lead over the fastest dense runtime, the bars missed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MODELS = Path(__file__).parents[1] / "bench" / "models.py"


def result(runtime: str, p50: float | None, threads: int = 1, kind: str = "prefill") -> Any:
    work = {"kind": kind, "batch": 1, "length": 16}
    return {"runtime": runtime, "cell": {"dtype": "bf16", "work": work, "threads": threads}} | {
        "p50": p50
    }


def report(tmp_path: Path, shape: str, *results: Any) -> list[str]:
    path = tmp_path / f"{shape}.json"
    path.write_text(json.dumps({"results": results}))
    command = [sys.executable, str(MODELS), str(path), "--png", str(tmp_path / "all.png")]
    out = subprocess.check_output(command, text=True)
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


def test_a_decoder_has_its_own_bars(tmp_path: Path) -> None:
    ours, peer = result("optimized", 10.0), result("llama.cpp", 16.0)
    assert report(tmp_path, "llama-1b", peer, ours)[-1].endswith("not 1.700")
    step = (result("llama.cpp", 10.1, kind="decode"), result("optimized", 10.0, kind="decode"))
    assert report(tmp_path, "llama-1b", *step)[-1] == "none"
