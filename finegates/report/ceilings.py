"""Ceilings of this machine's cores, measured, so that every time has something to be held against.

Both take the time of the measuring thread alone, and the best of three: other processes can only
lower them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch

from ..ops import _cpu


@functools.cache
def peak_flops(dtype: torch.dtype, threads: int) -> float:
    """Return multiply-adds times two a second that ``threads`` cores reach together.

    Args:
        dtype: bfloat16 takes the dot product where this process's instruction set has one; all else
            is float32 arithmetic.
        threads: number of cores.

    Raises:
        ValueError: there is no native module, or no measurement for its level.
    """
    return _total(threads, lambda _: _cpu.probe_flops(dtype))


@functools.cache
def read_bandwidth(megabytes: int, threads: int) -> float:
    """Return bytes a second that ``threads`` cores read together, each from a buffer of its own.

    Args:
        megabytes: of each buffer; what fits a cache is read from it.
        threads: number of cores.

    Raises:
        ValueError: there is no native module.
    """
    buffers = [torch.ones(megabytes * 2**20, dtype=torch.uint8) for _ in range(threads)]
    repeats = max(1, 256 // megabytes)
    return _total(threads, lambda i: max(_cpu.probe_read(buffers[i]) for _ in range(repeats)))


def _total(threads: int, measure: Callable[[int], float]) -> float:
    """Sum of what the threads reach at once (the probes drop the GIL); best of three."""
    best = 0.0
    for _ in range(3):
        rates = [0.0] * threads

        def run(i: int, rates: list[float] = rates) -> None:
            rates[i] = measure(i)

        workers = [threading.Thread(target=run, args=(i,)) for i in range(1, threads)]
        for worker in workers:
            worker.start()
        run(0)
        for worker in workers:
            worker.join()
        best = max(best, sum(rates))
    return best
