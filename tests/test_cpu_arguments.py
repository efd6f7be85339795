"""The native CPU path: arguments that do not fit end in an exception, never in the kernels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cpu_layer import F16, Layer, random
from finegates import _native
from finegates.ops import _cpu
from levels import LEVELS, run_capped

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason()))


def test_gated_pair_must_match() -> None:
    x = random(2, 40)
    gate, other = Layer(50, 40, 33, 29), Layer(50, 40, 33, 29, seed=1)
    with pytest.raises(ValueError, match="same rows and columns"):
        _cpu.pruned_glu(x, gate.packed, other.packed, 50)
    q, scale = _cpu.quantize_rows(gate.weight)
    small = _cpu.prepare(q, gate.bias, gate.rows, gate.columns, 50, 40, scale)
    with pytest.raises(ValueError, match="weights of the same type"):
        _cpu.pruned_glu(x, gate.packed, small, 50)
    with pytest.raises(ValueError, match="at most 8 layers in one call, got 9"):
        _cpu.pruned_linears(x, [gate.packed] * 9, [50] * 9)
    assert _cpu.pruned_linears(x, [], []) == []


def test_bad_arguments_are_value_errors() -> None:
    layer = Layer(50, 40, 33, 29)
    x = random(3, 40)
    packed = layer.packed
    with pytest.raises(ValueError, match="last dimension 39"):
        _cpu.pruned_linear(x[:, :39], packed, 50)
    with pytest.raises(ValueError, match="out_features is 51"):
        _cpu.pruned_linear(x, packed, 51)
    with pytest.raises(ValueError, match="activation must be one of"):
        _cpu.pruned_linear(x, packed, 50, "tanh")
    with pytest.raises(ValueError, match="residual must be"):
        _cpu.pruned_linear(x, packed, 50, "none", random(3, 40))
    with pytest.raises(ValueError, match="packed"):
        _cpu.pruned_linear(x, packed.float(), 50)
    with pytest.raises(ValueError, match="no finegates header"):
        _cpu.pruned_linear(x, torch.zeros_like(packed), 50)
    with pytest.raises(ValueError, match="header asks for"):
        _cpu.pruned_linear(x, packed[:-64], 50)
    with pytest.raises(ValueError, match="too short"):
        _cpu.pruned_linear(x, packed[:0], 50)
    with pytest.raises(TypeError, match="float64"):
        _cpu.pruned_linear(x.double(), packed, 50)
    for zero_dim in (torch.tensor(1.0), torch.tensor(1.0, dtype=F16)):
        with pytest.raises(TypeError, match="with a last dimension, got 0-D"):
            _cpu.pruned_linear(zero_dim, packed, 50)
        with pytest.raises(TypeError, match="with a last dimension, got 0-D"):
            _cpu.pruned_linears(zero_dim, [packed], [50])


CALLS: dict[str, Callable[[Tensor, Tensor, int], object]] = {
    "pruned_linear": _cpu.pruned_linear,
    "pruned_linears": lambda x, packed, n: _cpu.pruned_linears(x, [packed], [n]),
    "pruned_glu": lambda x, packed, n: _cpu.pruned_glu(x, packed, packed, n),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_bad_sizes_and_devices(call: Callable[[Tensor, Tensor, int], object]) -> None:
    """An address of another device never reaches the kernels, and nothing is allocated there."""
    layer = Layer(50, 40, 33, 29)
    x = random(3, 40)
    with pytest.raises(ValueError, match="out_features must not be negative, got -1"):
        call(x, layer.packed, -1)
    with pytest.raises(MemoryError, match="no room for a tensor of shape"):
        call(x, layer.packed, 2**55)
    with pytest.raises(ValueError, match="packed must be a 1-D uint8 CPU tensor, .* on meta"):
        call(x, layer.packed.to("meta"), 50)
    with pytest.raises(TypeError, match="on meta"):
        call(x.to("meta"), layer.packed, 50)


# Views that hold no memory; copied they would take petabytes.
HUGE = {
    "fp16": torch.ones(1, 1, dtype=F16).expand(2**45, 7),
    "no-rows": torch.ones(1, 1).expand(2**45, 7),
    "three-dimensions": torch.ones(1, 1, 1).expand(2**40, 2**5, 7),
}


@pytest.mark.parametrize("x", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_room_for_a_copy_of_x(call: Callable[[Tensor, Tensor, int], object], x: Tensor) -> None:
    nothing = Layer(0, 7, None, 3)  # so that y takes no memory
    with pytest.raises(MemoryError, match="no room for a tensor of shape"):
        call(x, nothing.packed, 0)


def test_no_room_for_other_copies() -> None:
    x = torch.empty(2**45, 0, dtype=F16)
    with pytest.raises(MemoryError, match=r"no room for a tensor of shape \(35184372088832, 4\)"):
        _cpu.pruned_linear(x, Layer(4, 0).packed, 4, "none", HUGE["fp16"][:, :4])
    for weight in (HUGE["fp16"], HUGE["no-rows"]):
        with pytest.raises(MemoryError, match="no room for a tensor of shape"):
            _cpu.prepare(weight)
    with pytest.raises(MemoryError, match="no room for a tensor of shape"):
        _cpu.prepare(torch.ones(2, 3), rows=torch.ones(1, dtype=torch.int32).expand(2**50))
    packed = _cpu.prepare(torch.ones(2, 0))
    with pytest.raises(MemoryError, match="no room for a tensor of shape"):
        _cpu.embedding(torch.zeros(1, dtype=torch.int32).expand(2**50), packed, 0, torch.float32)


def test_other_default_device() -> None:
    layer = Layer(50, 40, 33, 29)
    x = random(3, 40)
    want = [call(x, layer.packed, 50) for call in CALLS.values()]
    shifted = torch.empty(layer.packed.numel() + 1, dtype=torch.uint8)[1:].copy_(layer.packed)
    with torch.device("meta"):
        packed = _cpu.prepare(layer.weight, layer.bias, layer.rows, layer.columns, 50, 40)
        got = [call(x, packed, 50) for call in CALLS.values()]
        unpacked = _cpu.unpack(shifted)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert torch.equal(packed, layer.packed)
    assert torch.equal(unpacked.weight, layer.weight)
    assert unpacked.rows is not None
    assert unpacked.rows.is_cpu


def test_codes_that_do_not_fit_an_int() -> None:
    layer, x, y = Layer(50, 40, 33, 29), random(3, 40), torch.empty(3, 50)
    packed = layer.packed
    call = [packed.data_ptr(), packed.numel(), x.data_ptr(), 3, 40, 40, 0, y.data_ptr(), 50, 0, 0]
    _cpu._C.pruned_linear(*call)
    assert torch.equal(y, layer.run(x))
    for at, name in ((6, "dtype"), (10, "activation")):
        for code in (-1, 2**32, -(2**32)):
            with pytest.raises(ValueError, match=f"unknown {name} code"):
                _cpu._C.pruned_linear(*call[:at], code, *call[at + 1 :])


def test_null_pointers_are_value_errors() -> None:
    layer, x, y = Layer(50, 40, 33, 29), random(3, 40), torch.empty(3, 50)
    packed = (layer.packed.data_ptr(), layer.packed.numel())
    call = [*packed, x.data_ptr(), 3, 40, 40, 0, y.data_ptr(), 50, 0, 0]
    for at, message in ((0, "too short"), (2, "x or y is null"), (7, "x or y is null")):
        with pytest.raises(ValueError, match=message):
            _cpu._C.pruned_linear(*call[:at], 0, *call[at + 1 :])
    for pair in ((0, packed[1], *packed), (*packed, 0, packed[1])):
        with pytest.raises(ValueError, match="too short"):
            _cpu._C.pruned_glu(*pair, *call[2:9], 0)
    with pytest.raises(ValueError, match="x or y is null"):
        _cpu._C.pruned_linears([*packed, 0, 50], *call[2:7])


@pytest.mark.parametrize("huge", [2**31 + 1, 2**61, 2**63 - 1])
def test_sizes_that_would_overflow(huge: int) -> None:
    layer, x, y = Layer(50, 40, 33, 29), random(3, 40), torch.empty(3, 50)
    packed = layer.packed
    head = (packed.data_ptr(), packed.numel(), x.data_ptr())
    for m, stride in ((huge, 40), (3, huge * 2**10 if huge < 2**40 else huge)):
        with pytest.raises(ValueError, match="impossible row stride or number of rows"):
            _cpu._C.pruned_linear(*head, m, 40, stride, 0, y.data_ptr(), 50, 0, 0)


def test_no_memory_for_the_gathered_rows_is_a_memory_error() -> None:
    """x and the weight are there already; the scratch of 100 MB is not."""
    code = """
import resource, torch
from finegates.ops import _cpu
torch.set_num_threads(1)
x = torch.ones(64, 400_000)
packed = _cpu.prepare(torch.ones(1, 400_000))
pages = int(open("/proc/self/statm").read().split()[0])
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**24, before[1]))
try:
    _cpu.pruned_linear(x, packed, 1)
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, before)
    print(_cpu.pruned_linear(x[:1], packed, 1).item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "400000.0\n", done.stderr


@pytest.mark.parametrize("level", LEVELS)
def test_every_level(level: str) -> None:
    """The whole file again with the instruction set capped."""
    run_capped(__file__, level)
