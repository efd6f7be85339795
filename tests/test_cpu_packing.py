"""The packed layer of the native CPU path: what goes in comes out, and damage is told."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from cpu_layer import BF16, F32, SHAPES, Layer, random
from finegates import _native
from finegates.ops import _cpu
from levels import LEVELS, run_capped

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason()))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("n", "k", "rows", "columns"), SHAPES)
def test_unpack_is_exact(
    n: int, k: int, rows: int | None, columns: int | None, dtype: torch.dtype
) -> None:
    layer = Layer(n, k, rows, columns, dtype)
    weight, bias, kept_rows, kept_columns, _ = _cpu.unpack(layer.packed.clone())
    assert weight.dtype == dtype
    assert torch.equal(weight, layer.weight)
    assert bias is not None
    assert torch.equal(bias, layer.bias)
    for got, want in ((kept_rows, layer.rows), (kept_columns, layer.columns)):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, want)
    assert _cpu.describe(layer.packed)[1:5] == (*layer.weight.shape, n, k)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("size", "kept", "least", "most"),
    [
        (2048, 1587, 1, 3),
        (768, 595, 1, 3),
        (384, 297, 8, 9),
        (256, 197, 14, 16),
        (128, 99, 31, 34),
        (64, 49, 35, 41),
    ],
)
def test_packed_memory(size: int, kept: int, least: int, most: int, dtype: torch.dtype) -> None:
    """Percent above the weight's, as docs/native.md says."""
    layer = Layer(size, size, kept, kept, dtype)
    weight_bytes = layer.weight.numel() * layer.weight.element_size()
    assert least <= round(100 * (layer.packed.numel() / weight_bytes - 1)) <= most


def test_moved_and_misaligned_packed_tensors() -> None:
    layer = Layer(50, 40, 33, 29)
    x = random(3, 40)
    want = layer.run(x)
    shifted = torch.empty(layer.packed.numel() + 1, dtype=torch.uint8)[1:]
    shifted.copy_(layer.packed)
    strided = torch.empty(layer.packed.numel(), 2, dtype=torch.uint8)[:, 0]
    strided.copy_(layer.packed)
    for packed in (layer.packed.clone(), shifted, strided):
        assert torch.equal(_cpu.pruned_linear(x, packed, 50), want)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 2, 2], "strictly increasing"),
        ([0, 3, 2], "strictly increasing"),
        ([0, 2, 5], r"rows\[2\] = 5 is outside"),
        ([-1, 2, 3], r"rows\[0\] = -1 is outside"),
        ([0, 1], "rows has 2 entries"),
    ],
)
def test_bad_indices_are_value_errors(rows: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _cpu.prepare(torch.ones(3, 4), None, torch.tensor(rows), None, 5, 4)


def test_damaged_tables_are_value_errors() -> None:
    """Any bit of header and tables may flip: a ValueError, or another layer's right answer."""
    layer = Layer(60, 50, 40, 30, bias=False)
    x = random(2, 50)
    right = []
    for byte in range(_cpu.describe(layer.packed).bias_offset):
        for bit in range(8):
            other = copy.copy(layer)
            other.packed = layer.packed.clone()
            other.packed[byte] ^= 1 << bit
            try:
                other.run(x)
            except ValueError:
                continue
            other.weight, other.bias, other.rows, other.columns, _ = _cpu.unpack(other.packed)
            other.check(x)
            right.append(8 * byte + bit)
    # The flag of a bias, which is all zeros, and what lies between the tables.
    assert [bit for bit in right if bit < 8 * 64] == [8 * 7]


@pytest.mark.parametrize(
    ("byte", "value"),
    [(7, 2), (8, 0), (8, 255), (9, 0), (9, 3), (10, 1), (11, 1), (48, 1), (63, 1)],
)
def test_damaged_flags_are_value_errors(byte: int, value: int) -> None:
    """has_bias, has_rows and has_columns are 0 or 1 and mean what they say; the rest is 0."""
    packed = Layer(60, 50, 40, 30).packed
    packed[byte] = value
    with pytest.raises(ValueError, match="damaged flags"):
        _cpu.describe(packed)


def test_no_memory_for_packing_is_a_memory_error() -> None:
    """The weight of 256 MB is there; a packed copy is not."""
    code = """
import resource, torch
from finegates.ops import _cpu
weight = torch.ones(8192, 8192)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**24, -1))
try:
    _cpu.prepare(weight)
except MemoryError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("no room for a tensor of shape"), done.stderr


@pytest.mark.parametrize("level", LEVELS)
def test_every_level(level: str) -> None:
    """The whole file again with the instruction set capped."""
    run_capped(__file__, level)
