"""bench/models.py: a line a work, the lead over the fastest dense runtime, the bars missed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
import pytest

from finegates.report.bench_model import Cell, ModelBench, Result
from finegates.report.memory import Memory
from finegates.report.work import Work

ROOT = Path(__file__).parents[1]
MACHINE = {"cpu": "a CPU", "isa": "AVX512", "threads": 2, "torch": "2", "commit": "abc"}
MEMORY = [
    Memory("dense", 400, 700, 1000),
    Memory("pruned", 300, 700, 1000),
    Memory("optimized", 310, 700, 945),
    Memory("optimized, int8", 160, 500, 600),
]


def result(
    runtime: str,
    p50: float | None,
    threads: int = 1,
    kind: str = "prefill",
    dtype: str = "bf16",
    **more: Any,
) -> Result:
    return Result(runtime, Cell(dtype, Work(kind, 1, 16), threads), p50, **more)


def bench(
    shape: str, sparsity: float, *results: Result, memory: Sequence[Memory] = MEMORY
) -> ModelBench:
    return ModelBench(shape, 0.2, list(results), list(memory), shape, sparsity, MACHINE)


def faults(*arguments: Any, **options: Any) -> list[str]:
    return list(models.missed(bench(*arguments, **options)))


def encoder(transformers: float, openvino: float, ours: float) -> list[Result]:
    times = {"transformers": transformers, "OpenVINO": openvino, "optimized": ours}
    return [result(name, p50) for name, p50 in times.items()]


def test_an_encoder_is_held_against_the_fastest_and_minilm_against_transformers() -> None:
    assert faults("roberta-base", 0.4, *encoder(16.0, 15.0, 10.0)) == []
    assert faults("roberta-base", 0.4, *encoder(14.99, 16.0, 10.0)) == [
        "roberta-base bf16 prefill 1×16 T=1: 1.499 times the fastest dense, not 1.500"
    ]
    assert faults("minilm", 0.4, *encoder(24.0, 14.99, 10.0)) == [
        (
            "minilm bf16 prefill 1×16 T=1: 1.499 times the fastest dense, not 1.500; "
            "2.400 times transformers, not 2.500"
        )
    ]


def test_less_removed_asks_for_less() -> None:
    assert faults("minilm", 0.2, *encoder(24.0, 10.0, 10.0)) == []
    assert faults("minilm", 0.2, *encoder(24.0, 9.99, 10.0)) == [
        "minilm bf16 prefill 1×16 T=1: 0.999 times the fastest dense, not 1.000"
    ]
    assert faults("minilm", 0.0, *encoder(10.0, 1.0, 10.0)) == []
    assert faults("minilm", 0.0, *encoder(9.0, 1.0, 10.0)) == [
        "minilm bf16 prefill 1×16 T=1: 0.900 times transformers, not 1.000"
    ]


def test_a_peer_that_was_not_timed_is_a_miss() -> None:
    alone = [result("transformers", 40.0), result("optimized", 10.0)]
    assert faults("minilm", 0.0, *alone) == []
    assert faults("minilm", 0.2, *alone) == ["minilm bf16 prefill 1×16 T=1: OpenVINO not timed"]
    ours = result("optimized", 10.0, kind="decode", dtype="int8")
    step = [result("llama.cpp", None, kind="decode", dtype="int8", reason="broken"), ours]
    assert faults("smollm2", 0.4, *step)[0].endswith("int8 decode 1×16 T=1: llama.cpp not timed")
    assert faults("smollm2", 0.2, result("transformers", 1.0, kind="decode"))[0].endswith(
        ": optimized and llama.cpp not timed"
    )


def decode(llama: float, ours: float, bandwidth: float = 11e6, **more: Any) -> list[Result]:
    """The optimised model reads 93.5 kB, in 8.5 ms at 11 MB a second."""
    floor = {"weight_bytes": 93500, "bandwidth": bandwidth}
    return [
        result("transformers", 100.0, kind="decode", **more),
        result("llama.cpp", llama, kind="decode", **more),
        result("optimized", ours, kind="decode", **more, **floor),
    ]


def test_a_decoder_has_its_own_bars() -> None:
    assert faults("smollm2", 0.4, *decode(10.0, 10.0)) == []
    assert faults("smollm2", 0.4, *decode(9.0, 10.0, 1e9))[0].endswith(
        "0.900 times the fastest dense, not 1.000"
    )
    prefill = [
        result("transformers", 50.0), result("llama.cpp", 16.0), result("optimized", 10.0)
    ]  # fmt: skip
    assert faults("smollm2", 0.4, *decode(10.0, 10.0), *prefill)[0].endswith(
        "1.600 times the fastest dense, not 1.700"
    )
    assert faults("smollm2", 0.2, *decode(10.0, 10.0), *prefill) == []


def test_the_1b_shape_reads_at_85_percent_of_the_bandwidth() -> None:
    assert faults("llama-1b", 0.4, *decode(10.0, 10.0)) == []
    assert faults("llama-1b", 0.4, *decode(10.0, 10.0, 11.1e6)) == [
        "llama-1b bf16 decode 1×16 T=1: 0.842 of bandwidth, not 0.850"
    ]
    assert faults("llama-1b", 0.4, *decode(10.0, 10.0, 11.1e6, dtype="int8")) == []
    assert faults("llama-1b", 0.2, *decode(10.0, 10.0, 11.1e6)) == []


def test_peak_memory_is_that_of_dense_less_what_was_removed() -> None:
    """1000 less 100 allows 945."""
    fine = encoder(50.0, 15.0, 10.0)
    more = [*MEMORY[:2], Memory("optimized", 310, 700, 946), MEMORY[3]]
    assert faults("roberta-base", 0.4, *fine) == []
    assert faults("roberta-base", 0.4, *fine, memory=more) == [
        "roberta-base memory: 1.052 of dense less what was removed (optimized), more than 1.050"
    ]
    assert faults("roberta-base", 0.4, *fine, memory=()) == ["roberta-base memory: not measured"]
    assert faults("roberta-base", 0.2, *fine, memory=()) == []


def test_a_model_without_a_stated_bar_is_refused() -> None:
    with pytest.raises(ValueError, match="mine was timed without --shape"):
        list(models.missed(ModelBench("mine", 0.2, encoder(3.0, 2.0, 1.0), machine=MACHINE)))


def test_the_page(tmp_path: Path) -> None:
    two = [result("transformers", 4e3, threads=2), result("optimized", 1250.0, threads=2)]
    benches = {
        "minilm-0.4": bench("minilm", 0.4, *encoder(30.0, 16.0, 10.0), *two),
        "smollm2-0.4": bench("smollm2", 0.4, *decode(12.5, 10.0), memory=MEMORY[:3]),
        "minilm-0": bench("minilm", 0.0, *encoder(11.0, 12.0, 10.0), memory=()),
    }
    for name, values in benches.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values.to_dict()))
        again = ModelBench.from_dict(json.loads((tmp_path / f"{name}.json").read_text()))
        assert again == values
    command = [sys.executable, str(ROOT / "bench" / "models.py")]
    command += [str(tmp_path / f"{name}.json") for name in benches]
    out = subprocess.check_output(
        [*command, "--png", str(tmp_path / "all.png")],
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"
    lines = out.splitlines()
    for line in (
        "* a CPU, AVX512, 2 threads, torch 2, commit abc: minilm-0.4, smollm2-0.4, minilm-0",
        "| shape | work | bf16, 1 thread | bf16, 2 threads |",
        "| minilm | prefill 1×16 | 10 ms, 1.60× | 1250 ms, 3.20× |",
        "| smollm2 | decode 1×16 | 10 ms, 1.25×, 85 % | – |",
        "| minilm | 0 → 0 | 0 | 0 | 0 | 0 |",
        "| minilm | prefill 1×16 | 10 ms, 1.10× |",
        "* minilm bf16 prefill 1×16 T=2: OpenVINO not timed",
    ):
        assert line in lines, out
    shares = [line for line in lines if line.startswith("## ")]
    assert shares == [
        "## 40 % of the gated weights removed", "## 0 % of the gated weights removed"
    ]  # fmt: skip
    assert lines[-1] == "none"
