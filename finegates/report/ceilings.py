"""Ceilings of this machine's cores, measured, so that every time has something to be held against.

Both take the time of the measuring thread alone, and the best of several passes, which all threads
begin together: other processes can only lower them. Nothing is remembered: ceilings move with what
the neighbours do (two cores' bandwidth by 1.7), so ask for one beside what it is held against.
"""

from __future__ import annotations

import itertools
import statistics
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..ops import _cpu
from ..serving import PackedLinear
from .module_clock import LINEARS

_PASSES = 3
_READS = tuple(itertools.product((1, 2, 4), (64, 128, 256)))  # streams, lines ahead


def peak_flops(dtype: torch.dtype, threads: int) -> float:
    """Return multiply-adds times two a second that ``threads`` cores reach together.

    Args:
        dtype: bfloat16 takes the dot product where this process's instruction set has one; all else
            is float32 arithmetic.
        threads: number of cores.

    Raises:
        ValueError: there is no native module, or no measurement for its level.
    """
    return _best(threads, [lambda _: _cpu.probe_flops(dtype)] * _PASSES)


def read_bandwidth(megabytes: int, threads: int) -> float:
    """Return bytes a second that ``threads`` cores read together, each from a buffer of its own.

    The best of three prefetch distances and of 1, 2 and 4 streams. Several threads read equally
    much and begin together; the rate of each is that of its whole pass, since it may have had the
    best part of it to itself.

    Args:
        megabytes: of each buffer; what fits a cache is read from it.
        threads: number of cores.

    Raises:
        ValueError: there is no native module.
    """
    buffers = [torch.ones(megabytes * 2**20, dtype=torch.uint8) for _ in range(threads)]
    repeats = max(1, 256 // megabytes)

    def reads(streams: int, ahead: int) -> Callable[[int], float]:
        def measure(i: int) -> float:
            rates = [_cpu.probe_read(buffers[i], streams, ahead) for _ in range(repeats)]
            return max(rates) if threads == 1 else statistics.harmonic_mean(rates)

        return measure

    return _best(threads, [reads(*how) for how in _READS] * _PASSES)


def weight_bytes(layer: Any) -> int:
    """Return the bytes of a Linear's kept weight in the form that it is read."""
    if isinstance(layer, PackedLinear):
        layout = _cpu.describe(layer.packed)
        return int(layout.n_rows * layout.n_columns * layout.dtype.itemsize)
    return int(layer.weight.numel() * layer.weight.element_size())


def reading(model: nn.Module, threads: int) -> tuple[int, float]:
    """Return the bytes of all of a model's Linears, and bytes a second as they would be read.

    The buffers are of the model's size, up to 256 MiB: a model that fits a cache is read from it.

    Raises:
        ValueError: there is no native module.
    """
    size = sum(weight_bytes(layer) for layer in model.modules() if isinstance(layer, LINEARS))
    megabytes = max(1, min(256, size // threads // 2**20))
    return size, read_bandwidth(megabytes, threads)


def _best(threads: int, passes: list[Callable[[int], float]]) -> float:
    """Return the most that threads reach together in a pass (the probes drop the GIL)."""
    start = threading.Barrier(threads)
    rates = [[0.0] * threads for _ in passes]

    def run(i: int) -> None:
        for measure, rate in zip(passes, rates, strict=True):
            start.wait()  # a pass that ran beside none of the others would have their bandwidth
            rate[i] = measure(i)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(1, threads)]
    for worker in workers:
        worker.start()
    run(0)
    for worker in workers:
        worker.join()
    return max(map(sum, rates))
