"""Measures the ceilings of this machine's cores, so that every number has one."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
import threading
from pathlib import Path

import torch


@functools.cache
def _library() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="finegates-probe-"))
    target = folder / "probe.so"
    source = Path(__file__).with_name("probe.cpp")
    subprocess.run(
        ["c++", "-O3", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(target)],
        check=True,
    )
    library = ctypes.CDLL(str(target))
    for name in ("probe_fma_256", "probe_fma_512", "probe_dot_512", "probe_read"):
        getattr(library, name).restype = ctypes.c_double
    library.probe_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


def _total(threads: int, measure: object) -> float:
    """Sum of what `threads` threads reach at once (ctypes drops the GIL); best of three."""
    best = 0.0
    for _ in range(3):
        rates = [0.0] * threads

        def run(i: int, rates: list[float] = rates) -> None:
            rates[i] = measure(i)  # type: ignore[operator]

        workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(rates))
    return best


@functools.cache
def peak_flops(dtype: str, isa: str, threads: int) -> float:
    """Return multiply-adds times two a second that `threads` cores reach at this level."""
    name = "probe_fma_512" if isa.startswith("avx512") else "probe_fma_256"
    if dtype == "bf16" and isa == "avx512bf16":
        name = "probe_dot_512"
    function = getattr(_library(), name)
    return _total(threads, lambda _: function())


@functools.cache
def read_bandwidth(megabytes: int, threads: int) -> float:
    """Return bytes a second read from a buffer of this size for each thread."""
    buffers = [torch.ones(megabytes * 2**20, dtype=torch.uint8) for _ in range(threads)]
    repeats = max(1, 256 // megabytes)

    def read(i: int) -> float:
        rates = [
            _library().probe_read(buffers[i].data_ptr(), buffers[i].numel()) for _ in range(repeats)
        ]
        return max(rates)

    return _total(threads, read)
