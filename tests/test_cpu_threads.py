"""The native CPU path: bitwise the same rows whatever the batch and the threads."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cpu_layer import BF16, F32, Layer, random
from finegates import _native
from finegates.ops import _cpu
from finegates.report.timing import threads_set_to
from levels import LEVELS, run_capped

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason()))


def tasks() -> set[str]:
    """The process's OS threads: while some of an earlier pool end, a listing can miss others."""
    before: set[str] = set()
    while before != (now := set(os.listdir("/proc/self/task"))):
        before = now
        time.sleep(0.001)
    return now


def team(call: Callable[[], object]) -> int:
    """How many OS threads run a call from a new Python thread, which has no OpenMP pool yet."""
    started: set[str] = set()

    def count() -> None:
        before = tasks()
        call()
        started.update(tasks() - before)

    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    return 1 + len(started)


@pytest.mark.parametrize("weight_dtype", [F32, BF16], ids=["w32", "w16"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["x32", "x16"])
def test_bitwise_for_any_batch_position_and_threads(
    dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    layer = Layer(300, 900, 233, 697, weight_dtype)
    x = random(67, 900, dtype=dtype)
    with threads_set_to(1):
        whole = layer.run(x, "gelu")
        for m in range(1, 67):
            assert torch.equal(layer.run(x[67 - m :], "gelu"), whole[67 - m :])
    for threads in (2, 3, 4):
        with threads_set_to(threads):
            for _ in range(5):
                assert torch.equal(layer.run(x, "gelu"), whole)
            assert torch.equal(layer.run(x[5:6], "gelu"), whole[5:6])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["x32", "x16"])
@pytest.mark.parametrize("kind", ["int8", "pair"])
def test_bitwise_for_any_batch_and_position_of_int8_and_pairs(
    kind: str, dtype: torch.dtype
) -> None:
    layer, other = (Layer(300, 900, 233, 697, dtype) for _ in range(2))
    packed, x = layer.packed, random(67, 900, dtype=dtype)
    up = _cpu.prepare(other.weight, other.bias, layer.rows, layer.columns, 300, 900)
    if kind == "int8":
        q, scale = _cpu.quantize_rows(layer.weight)
        packed = _cpu.prepare(q, layer.bias, layer.rows, layer.columns, 300, 900, scale)

    def run(x: Tensor) -> Tensor:
        if kind == "pair":
            return _cpu.pruned_glu(x, packed, up, 300)
        return _cpu.pruned_linear(x, packed, 300)

    with threads_set_to(1):
        whole = run(x)
        for m in range(1, 67):
            assert torch.equal(run(x[67 - m :]), whole[67 - m :])


@pytest.mark.parametrize(
    ("size", "kept", "m"),
    [
        pytest.param(2048, 1587, 1, id="2048-M1"),
        pytest.param(768, 595, 67, id="768-M67"),
        pytest.param(768, 595, 300, id="768-M300"),
    ],
)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "pair", "together"])
def test_bitwise_for_any_thread_count(kind: str, size: int, kept: int, m: int) -> None:
    """Work enough for a team, more threads than shares of the work (16) among them."""
    dtype = BF16 if kind == "bf16" else F32
    layer = Layer(size, size, kept, kept, dtype)
    packed, x = layer.packed, random(m, size, dtype=dtype)
    if kind == "int8":
        q, scale = _cpu.quantize_rows(layer.weight)
        packed = _cpu.prepare(q, layer.bias, layer.rows, layer.columns, size, size, scale)

    def run() -> list[Tensor]:
        if kind == "pair":
            return [_cpu.pruned_glu(x, packed, packed, size)]
        if kind == "together":
            return _cpu.pruned_linears(x, [packed] * 3, [size] * 3)
        return [_cpu.pruned_linear(x, packed, size)]

    with threads_set_to(1):
        want = torch.stack(run())
    for threads in (2, 3, 17):
        with threads_set_to(threads):
            assert team(run) == threads
            for _ in range(3):
                assert torch.equal(torch.stack(run()), want)


def test_shares_torch_openmp() -> None:
    """In a process of its own: other tests import packages that bundle a libgomp."""
    code = """
import torch
from finegates.ops import _cpu
packed = _cpu.prepare(torch.randn(64, 64))
_cpu.pruned_linear(torch.randn(64, 64), packed, 64) @ torch.randn(64, 64)
maps = open("/proc/self/maps").read().split()
print(len({path for path in maps if "libgomp" in path or "libomp" in path}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1"


def test_torch_thread_count_reaches_new_python_threads() -> None:
    omp = ctypes.CDLL("libgomp.so.1")
    layer, x = Layer(64, 64), random(1, 64)
    seen: list[int] = []

    def call() -> None:
        layer.run(x)
        seen.append(omp.omp_get_max_threads())

    for count in (1, 2, 3):
        with threads_set_to(count):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("threads", [1, 2], ids=["serial", "parallel"])
def test_many_python_threads(threads: int) -> None:
    """Eight Python threads, 10,000 calls of mixed sizes: bitwise what one thread computes."""
    layers = [Layer(900, 400, 701, 301, BF16), Layer(700, 900, 551, 701), Layer(33, 17, 5, 9)]
    work = []
    for layer in layers:
        for m in (1, 3, 20):
            x = random(m, layer.in_features, dtype=layer.weight.dtype)
            work.append((layer, x, layer.run(x, "silu")))
    wrong: list[int] = []

    def call(seed: int) -> None:
        # Teams of two on two cores wait for each other: fewer calls tell as much.
        for i in range(1250 if threads == 1 else 125):
            layer, x, want = work[(seed * 7 + i) % len(work)]
            if not torch.equal(layer.run(x, "silu"), want):
                wrong.append(i)

    with threads_set_to(threads):
        # The small layer and a single bf16 row stay serial.
        teams = [team(lambda args=args: args[0].run(args[1], "silu")) for args in work]
        assert teams.count(threads) >= 4
        pool = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize("level", LEVELS)
def test_every_level(level: str) -> None:
    """The whole file again with the instruction set capped."""
    run_capped(__file__, level)
