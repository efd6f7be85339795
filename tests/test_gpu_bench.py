"""The GPU benchmarks, run dry on a CPU, and what they measure with, held against known answers."""

from __future__ import annotations

import csv
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_gated_linear
import gpu_clock
import gpu_layers
import gpu_stand_in
import gpu_tests
import pytest
import torch

from finegates import GateConfig

TESTS = Path(__file__).parent
BENCH = TESTS.with_name("bench")
PATHS = os.pathsep.join([str(TESTS.parent), str(TESTS)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "providers", "modes", "count"),
    [
        (
            "bench_gated_linear.py",
            {
                "frozen", "naive", "compiled", "trained", "finegates", "finegates-fused",
                "finegates-fold", "finegates-trained", "finegates-compact-40%",
                *(f"finegates-ordered-{share}%" for share in (0, 30, 60, 90)),
            },
            {"forward", "full", "full-eager"},
            13 * 5,
        ),
        ("gpu_pruned_linear.py", {"dense", "torch", "finegates"}, {"forward"}, 6),
    ],
)  # fmt: skip
def test_dry_run(
    script: str, providers: set[str], modes: set[str], count: int, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    output = tmp_path / "out.csv"
    command = [sys.executable, str(BENCH / script), "--dry-run", "--repeats", "2"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": PATHS}
    done = subprocess.run(
        [*command, "--output", str(output)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    assert "met: " in done.stdout
    assert output.with_suffix(".txt").read_text() == done.stdout
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    assert {row["kernel_provider"] for row in rows} == providers
    assert {row["kernel_operation_mode"] for row in rows} == modes
    assert {row["gpu_name"] for row in rows} == {"dry run on a CPU"}
    kept = {row["kernel_provider"]: float(row["kept_fraction"]) for row in rows}
    assert all((share < 1.0) == (name[-1] == "%" and name[-3:] != "-0%")
               for name, share in kept.items() if name.startswith("finegates-"))  # fmt: skip


@pytest.mark.parametrize(
    "script", ["bench_gated_linear.py", "gpu_pruned_linear.py", "gpu_tests.py"]
)
def test_without_a_gpu_it_says_so(script: str) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PATHS}
    command = [sys.executable, str(BENCH / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no GPU here" in done.stderr


@pytest.mark.parametrize("count", ["1", "0"])
def test_too_few_repeats_are_refused(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = gpu_clock.command_line(None, repeats=50)
    with pytest.raises(SystemExit):
        parser.parse_args(["--repeats", count])
    assert f"must be at least 2, got {count}" in capsys.readouterr().err
    assert parser.parse_args(["--repeats", "2"]).repeats == 2


def make(python: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--silent", "gpu-bench", f"PYTHON={python}"]
    return subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, check=False)


def test_one_command_runs_the_tests_and_both_tables() -> None:
    """Every job, whatever failed before it; what failed is named and is the exit status."""
    done = make("echo")
    assert done.returncode == 0, done.stderr
    assert "tests/test_triton_gpu.py --need-sanitizer" in done.stdout
    scripts = re.findall(r"\b(?:tests|bench)/\w+\.py", done.stdout)
    assert scripts == [
        "bench/gpu_tests.py",
        "tests/test_triton_gpu.py",
        "bench/gpu_tests.py",
        "tests/test_finetune.py",
        "bench/bench_gated_linear.py",
        "bench/gpu_pruned_linear.py",
    ]
    assert all((BENCH.parent / script).exists() for script in scripts)
    failed = make("false")
    assert failed.returncode != 0
    assert all(script in failed.stdout.splitlines()[-1] for script in scripts)


def test_what_became_of_each_test_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "test_two.py"
    script.write_text("def test_a(): pass\ndef test_b(): assert False\n")
    folder = tmp_path / "card"
    assert gpu_tests.run([str(script)], folder) == 1
    said = (folder / "test_two.txt").read_text()
    assert re.search(r"^PASSED .*::test_a$", said, re.MULTILINE)
    assert re.search(r"^FAILED .*::test_b\b", said, re.MULTILINE)


def test_the_stand_in_is_a_part_of_cuda() -> None:
    """Every public name is torch's, with parameters that torch takes too."""
    classes = {gpu_stand_in.Stream, gpu_stand_in.Event, gpu_stand_in.CUDAGraph}
    for name, own in inspect.getmembers(gpu_stand_in):
        if getattr(own, "__module__", None) != gpu_stand_in.__name__ or name.startswith("_"):
            continue
        theirs = getattr(torch.cuda, name)
        if own in classes:
            methods = [method for method in vars(own) if not method.startswith("_")]
            assert all(callable(getattr(theirs, method)) for method in methods), name
        elif inspect.isfunction(theirs):
            assert len(inspect.signature(own).parameters) <= len(
                inspect.signature(theirs).parameters
            )


def nothing() -> None:
    """A call whose time nobody cares for."""


def wait() -> None:
    gpu_stand_in.synchronize()


def early() -> None:
    first, last = (gpu_stand_in.Event(enable_timing=True) for _ in range(2))
    first.record()
    last.record()
    first.elapsed_time(last)


def cold() -> None:
    with gpu_stand_in.graph(gpu_stand_in.CUDAGraph()):
        pass


def unordered() -> None:
    with gpu_stand_in.stream(gpu_stand_in.Stream()):
        pass


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        (lambda: gpu_clock.Clock(dry_run=True).graphed(wait), "waited while a graph"),
        (early, "not waited for"),
        (cold, "without a warm-up"),
        (unordered, "doesn't wait"),
        (lambda: gpu_stand_in.CUDAGraph().replay(), "never captured"),
    ],
)
def test_the_stand_in_refuses(mistake: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        mistake()


def test_capture_warms_up_and_times_replays_only() -> None:
    calls = []
    clock = gpu_clock.Clock(dry_run=True)
    replay = clock.graphed(lambda: calls.append(len(calls)))
    assert len(calls) == clock.warmups + 1
    for measure in (clock.device_time, clock.wall_time):
        times = clock.interleaved({"replay": replay, "nothing": nothing}, measure, 5)
        assert all(low <= middle <= high for middle, low, high in times.values())
    assert len(calls) == clock.warmups + 1


def test_calls_take_turns() -> None:
    turns: list[str] = []
    clock = gpu_clock.Clock(dry_run=True)
    runs = {name: lambda name=name: turns.append(name) for name in "ab"}
    clock.interleaved(runs, clock.device_time, 3)
    assert turns == [*"ab", *"ababab"]


REQUESTED = "requested_bytes.all.current"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes that the stand-in's allocator reports, one after the other."""
    answers: list[int] = []
    monkeypatch.setattr(gpu_stand_in, "memory_allocated", lambda: answers.pop(0))
    monkeypatch.setattr(gpu_stand_in, "max_memory_allocated", lambda: answers.pop(0))
    monkeypatch.setattr(gpu_stand_in, "memory_stats", lambda: {REQUESTED: answers.pop(0)})
    yield answers
    assert not answers


def test_memory_is_counted_above_what_was_there(memory: list[int]) -> None:
    clock = gpu_clock.Clock(dry_run=True)
    memory[:] = [1000, 5000]
    assert clock.peak_bytes(nothing) == 4000
    memory[:] = [1000, 3000]
    assert clock.held_bytes(lambda: torch.ones(2)) == 2000


def test_memory_is_read_while_the_output_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = []

    class Output:
        def __init__(self) -> None:
            alive.append(self)

    monkeypatch.setattr(
        gpu_stand_in, "memory_stats", lambda: {REQUESTED: sys.getrefcount(alive[-1])}
    )
    # One reference more than the list's, once the call has returned: the one that holds it.
    assert gpu_clock.Clock(dry_run=True).held_bytes(Output) == 1


@pytest.mark.parametrize(
    ("name", "ours", "compiled", "saved", "missed"),
    [
        ("roberta-base.up", 1.2, 2.0, 560, 0),
        ("roberta-base.up", 1.3, 2.0, 560, 1),
        ("roberta-base.up", 1.2, 1.7, 560, 1),
        ("llama-7b.up", 1.2, 1.3, 561, 2),
        ("llama-1b.qo", 1.1, 1.1, 0, 0),
    ],
)
def test_bars(name: str, ours: float, compiled: float, saved: int, missed: int) -> None:
    """The allowance of 66 rows and 70 columns is 264 + 280 bytes, and 16 for the seed."""
    config = GateConfig(distribution="gaussian")
    layer = gpu_layers.make((66, 70, True), 3, torch.float32, config, "cpu")
    times = {"frozen": 1.0, "compiled": compiled, "finegates": ours}
    said: list[str] = []
    assert bench_gated_linear.judge(name, layer, times, saved, said.append) == missed
    assert sum("MISSED" in line for line in said) == missed
    assert "at most 560" in said[1]


def test_results_lie_by_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_clock, "RESULTS", tmp_path)
    report = gpu_clock.Report(None, "NVIDIA H100 80GB HBM3", "table.csv")
    report.write()
    report.end()
    folder = tmp_path / "nvidia-h100-80gb-hbm3"
    assert (folder / "table.csv").read_text().startswith("kernel_name,")
    assert (folder / "table.txt").read_text() == "0 rows of NVIDIA H100 80GB HBM3 in table.csv\n"
