"""The part of ``torch.cuda`` that the GPU benchmarks use, on a CPU: a dry run runs every line.

It measures nothing, and refuses what CUDA refuses: a time read before anyone waited for it, a wait
while a graph is captured, a replay of a graph that holds nothing. It also refuses what CUDA lets
pass and what then goes wrong now and then: a capture without a warm-up on a stream of its own, and
such a stream that doesn't wait for the one that made its operands.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stream:
    """A stream that knows whether it has waited for another one."""

    def __init__(self) -> None:
        self.waits = False

    def wait_stream(self, _: Stream) -> None:
        self.waits = True


class CUDAGraph:
    """A graph of nothing."""

    def __init__(self) -> None:
        self.captured = False

    def replay(self) -> None:
        if not self.captured:
            raise RuntimeError("a graph was replayed that was never captured")


class Event:
    """A point in time, known once the device was waited for."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing
        self.seconds: float | None = None

    def record(self) -> None:
        self.seconds = time.perf_counter()
        _device.pending.add(self)

    def elapsed_time(self, end: Event) -> float:
        """Return milliseconds from this event to ``end``."""
        if not (self.enable_timing and end.enable_timing):
            raise RuntimeError("an event was made without enable_timing")
        if self.seconds is None or end.seconds is None or _device.pending & {self, end}:
            raise RuntimeError("an event was read that is not recorded, or not waited for")
        return 1e3 * (end.seconds - self.seconds)


class _Device:
    """What the one device is doing."""

    def __init__(self) -> None:
        self.pending: set[Event] = set()
        self.current = Stream()
        self.warm = False
        self.capturing = False


_device = _Device()


def get_device_name() -> str:
    return "dry run on a CPU"


def current_stream() -> Stream:
    return _device.current


@contextmanager
def stream(side: Stream) -> Iterator[None]:
    if not side.waits:
        raise RuntimeError("a stream was used that doesn't wait for the current one")
    before, _device.current = _device.current, side
    yield
    _device.current, _device.warm = before, True


@contextmanager
def graph(captured: CUDAGraph) -> Iterator[None]:
    if not _device.warm:
        raise RuntimeError("a graph was captured without a warm-up on a stream of its own")
    _device.capturing = True
    try:
        yield
    finally:
        _device.capturing = _device.warm = False
    captured.captured = True


def synchronize() -> None:
    if _device.capturing:
        raise RuntimeError("the host waited while a graph was captured")
    _device.pending.clear()


def reset_peak_memory_stats() -> None:
    pass


def memory_allocated() -> int:
    return 0


def max_memory_allocated() -> int:
    return 0


def memory_stats() -> dict[str, int]:
    return {"requested_bytes.all.current": 0}
