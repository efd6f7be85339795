"""Latencies of models against each other, and the machine they were taken on."""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Timing:
    """Latency of one model on one input at one number of threads.

    Args:
        model, inputs, threads: what was timed.
        median, p10, p90: milliseconds.
        speedup: the first model's time over this one's, median over the rounds.
        rounds: how many times each model ran.
    """

    model: str
    inputs: str
    threads: int
    median: float
    p10: float
    p90: float
    speedup: float
    rounds: int


@torch.inference_mode()
def latency(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Mapping[str, Tensor] | Tensor],
    threads: Sequence[int] | None = None,
    *,
    seconds: float = 5.0,
    warmup: int = 3,
    min_rounds: int = 10,
    max_rounds: int = 300,
) -> list[Timing]:
    """Time models against each other: same process, same inputs, interleaved.

    A round runs every model once, starting with another one each time, so that drift of the
    machine meets all alike. Models run in evaluation mode without gradients, and the garbage
    collector is off while the clock runs.

    Args:
        models: the first one is the baseline of the speed-ups.
        inputs: per label a tensor, or a mapping of keyword arguments.
        threads: torch thread counts; None takes 1 and the current number.
        seconds: time budget for every pair of input and thread count.
        warmup: untimed runs of each model before.
        min_rounds, max_rounds: bounds that go before the budget.

    Returns:
        One `Timing` per input, thread count and model.

    Raises:
        ValueError: there is no model or no input, or a number is below 1.

    Example:
        >>> models = {"wide": nn.Linear(64, 64), "narrow": nn.Linear(64, 8)}
        >>> timings = latency(models, {"batch 1": torch.ones(1, 64)}, [1], seconds=0.01)
        >>> [(t.model, t.inputs, t.threads) for t in timings]
        [('wide', 'batch 1', 1), ('narrow', 'batch 1', 1)]
    """
    for argument, value in (("models", models), ("inputs", inputs)):
        if not value:
            raise ValueError(f"{argument} must not be empty")
    counts = {"min_rounds": min_rounds, "max_rounds": max_rounds}
    counts.update({} if threads is None else {"threads": min(threads, default=0)})
    for argument, count in counts.items():
        if count < 1:
            raise ValueError(f"{argument} must be at least 1, got {count}")
    if threads is None:
        threads = sorted({1, torch.get_num_threads()})
    timings = []
    with threads_set_to(torch.get_num_threads()), _evaluating(models.values()):
        for label, values in inputs.items():
            calls = {name: _call(model, values) for name, model in models.items()}
            for count in threads:
                torch.set_num_threads(count)
                times = interleave(
                    calls,
                    seconds,
                    warmup=warmup,
                    min_rounds=min_rounds,
                    max_rounds=max_rounds,
                )
                baseline = next(iter(times.values()))
                timings += [
                    _timing(name, label, count, series, baseline) for name, series in times.items()
                ]
    return timings


@contextmanager
def threads_set_to(threads: int) -> Iterator[None]:
    """Set torch's number of threads, and restore it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _evaluating(models: Any) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _call(model: nn.Module, values: Mapping[str, Tensor] | Tensor) -> Callable[[], Any]:
    tensors = [values] if isinstance(values, Tensor) else list(values.values())
    cuda = any(tensor.is_cuda for tensor in tensors)

    def call() -> None:
        _ = model(values) if isinstance(values, Tensor) else model(**values)
        if cuda:
            torch.cuda.synchronize()

    return call


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    seconds: float,
    *,
    warmup: int = 2,
    min_rounds: int = 5,
    max_rounds: int = 300,
    sample: float = 0.0,
    settle: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time the calls in turn, round by round, so that all see the same machine.

    Every round starts with another call, and the garbage collector is off.

    Args:
        calls: what to time, by name.
        seconds: time budget, warm-up apart.
        warmup: untimed runs of each call before.
        min_rounds, max_rounds: bounds that go before the budget.
        sample: seconds that one sample should last at least; short calls are repeated to fill it.
        settle: seconds to sleep before each sample, so that other runtimes' threads stop spinning;
            an untimed call then wakes its own.
        clock: seconds; `time.thread_time` sees less of other processes than the wall clock.

    Returns:
        Per call the seconds that it took, one per round.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        repeats = {name: _repeats(calls[name], warmup, sample, clock) for name in names}
        end = time.perf_counter() + seconds
        for round_ in range(max(min_rounds, max_rounds)):
            if round_ >= min_rounds and time.perf_counter() >= end:
                break
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                call, count = calls[name], repeats[name]
                if settle:
                    time.sleep(settle)
                    call()
                begin = clock()
                for _ in range(count):
                    call()
                times[name].append((clock() - begin) / count)
    return times


def _repeats(
    call: Callable[[], Any], warmup: int, sample: float, clock: Callable[[], float]
) -> int:
    """Warm a call up and return how many of them fill a sample."""
    cost = 0.0
    for _ in range(max(warmup, 1 if sample else 0)):
        begin = clock()
        call()
        cost = clock() - begin
    return max(1, int(sample / max(cost, 1e-6)))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _timing(
    model: str, inputs: str, threads: int, times: Sequence[float], baseline: Sequence[float]
) -> Timing:
    speedup = statistics.median(b / t for b, t in zip(baseline, times, strict=True))
    middle, p10, p90 = (1e3 * percentile(times, share) for share in (0.5, 0.1, 0.9))
    return Timing(model, inputs, threads, middle, p10, p90, speedup, len(times))


def percentile(times: Sequence[float], share: float) -> float:
    """Return the time below which a share of the times lie, between the two nearest ones.

    Example:
        >>> percentile([4.0, 1.0, 2.0, 3.0], 0.5)
        2.5
    """
    ranked = sorted(times)
    place = share * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def machine() -> dict[str, Any]:
    """Return the facts that latencies depend on."""
    return {
        "cpu": cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def commit(package: Path = Path(__file__).parents[1]) -> str:
    """Return the commit that a package's files are of, or the installed version outside of git.

    " and changes" is added where the package or the kernels' sources differ from the commit.
    """

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(package), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    try:
        # An environment may lie in a repository that knows nothing of what is installed in it.
        if git("ls-files", "--error-unmatch", "__init__.py").returncode == 0:
            changed = git("diff", "--quiet", "HEAD", "--", ".", "../csrc").returncode
            return git("rev-parse", "HEAD").stdout.strip() + " and changes" * bool(changed)
    except OSError:  # there is no git
        pass
    try:
        return version("finegates")
    except PackageNotFoundError:
        return "unknown"


def cpu_name(cpuinfo: str | os.PathLike[str] = "/proc/cpuinfo") -> str:
    """Return the processor's name as the system tells it, with family and model where it has them.

    A virtual machine often says "AMD EPYC" alone, of Zen 4 (family 25) and of Zen 5 (family 26),
    whose vector units do twice as much in a cycle.
    """
    facts: dict[str, str] = {}
    try:
        for line in Path(cpuinfo).read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = facts.get("model name") or platform.processor() or platform.machine() or "unknown"
    if "cpu family" in facts and "model" in facts:
        return f"{name} (family {facts['cpu family']}, model {facts['model']})"
    return name
