"""The native CPU path against fp64, at the level of the instruction set this process chose.

``test_every_level`` runs this file again in a subprocess for each lower level.
"""

from __future__ import annotations

import copy
import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finegates import _native
from finegates.ops import _cpu
from finegates.report.timing import threads_set_to
from levels import LEVELS, run_capped
from numerics import assert_no_worse

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason()))

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ACTIVATE: dict[str, Any] = {
    "none": lambda t: t,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class Layer:
    """A random pruned layer, its packed form and its two references."""

    def __init__(
        self,
        out_features: int,
        in_features: int,
        n_rows: int | None = None,
        n_columns: int | None = None,
        dtype: torch.dtype = F32,
        bias: bool = True,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.out_features, self.in_features = out_features, in_features
        self.rows = self._kept(out_features, n_rows, g)
        self.columns = self._kept(in_features, n_columns, g)
        n = out_features if n_rows is None else n_rows
        k = in_features if n_columns is None else n_columns
        self.weight = (torch.randn(n, k, generator=g) / max(1, k) ** 0.5).to(dtype)
        self.bias = torch.randn(n, generator=g) if bias else None
        self.packed = _cpu.prepare(
            self.weight, self.bias, self.rows, self.columns, out_features, in_features
        )

    @staticmethod
    def _kept(full: int, kept: int | None, g: torch.Generator) -> Tensor | None:
        if kept is None:
            return None
        return torch.randperm(full, generator=g)[:kept].sort().values.int()

    def run(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        return _cpu.pruned_linear(x, self.packed, self.out_features, activation, residual)

    def expected(
        self,
        x: Tensor,
        dtype: torch.dtype,
        activation: str = "none",
        residual: Tensor | None = None,
    ) -> Tensor:
        """The formula in plain PyTorch at ``dtype``."""
        kept = x if self.columns is None else x.index_select(-1, self.columns)
        bias = None if self.bias is None else self.bias.to(dtype)
        z = ACTIVATE[activation](F.linear(kept.to(dtype), self.weight.to(dtype), bias))
        y = torch.zeros(*x.shape[:-1], self.out_features, dtype=dtype)
        if self.rows is None:
            y = z
        else:
            y.index_copy_(-1, self.rows.long(), z)
        return y if residual is None else y + residual.to(dtype)

    def magnitude(self, x: Tensor) -> float:
        kept = x if self.columns is None else x.index_select(-1, self.columns)
        sums = F.linear(kept.double().abs(), self.weight.double().abs())
        largest = sums.max().item() if sums.numel() else 0.0
        return largest + (0.0 if self.bias is None else 4.0)

    def check(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        y = self.run(x, activation, residual)
        assert_no_worse(
            y,
            self.expected(x, x.dtype, activation, residual),
            self.expected(x, torch.float64, activation, residual),
            2 * self.magnitude(x),
        )
        if self.rows is not None and residual is None:
            removed = torch.ones(self.out_features, dtype=torch.bool)
            removed[self.rows.long()] = False
            assert (y[..., removed] == 0).all()
        return y


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def team(call: Callable[[], object]) -> int:
    """How many OS threads run a call from a new Python thread, which has no OpenMP pool yet."""
    started: set[str] = set()

    def count() -> None:
        before = set(os.listdir("/proc/self/task"))
        call()
        started.update(set(os.listdir("/proc/self/task")) - before)

    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    return 1 + len(started)


SHAPES = [  # out, in, kept rows, kept columns
    pytest.param(768, 768, 595, 595, id="768x768"),
    pytest.param(100, 90, 77, 61, id="100x90"),
    pytest.param(40, 900, 31, 801, id="several-K-blocks"),
    pytest.param(1000, 50, 3, 2, id="sparse"),
    pytest.param(33, 17, None, 9, id="all-rows"),
    pytest.param(33, 17, 5, None, id="all-columns"),
    pytest.param(129, 65, None, None, id="dense"),
    pytest.param(1, 1, 1, 1, id="one"),
]


@pytest.mark.parametrize("weight_dtype", [F32, BF16], ids=["w32", "w16"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["x32", "x16", "xhalf"])
@pytest.mark.parametrize(("n", "k", "rows", "columns"), SHAPES)
def test_matches_reference(
    n: int,
    k: int,
    rows: int | None,
    columns: int | None,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> None:
    layer = Layer(n, k, rows, columns, weight_dtype)
    for m in (1, 2, 3, 4, 5, 7, 12, 13, 15, 29, 64):
        layer.check(random(m, k, dtype=dtype))


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", list(ACTIVATE))
def test_epilogues(activation: str, dtype: torch.dtype, with_residual: bool) -> None:
    layer = Layer(97, 65, 71, 43, dtype)
    x = random(19, 65, dtype=dtype) * 3
    layer.check(x, activation, random(19, 97, dtype=dtype) if with_residual else None)


@pytest.mark.parametrize("activation", list(ACTIVATE))
def test_activation_extremes(activation: str) -> None:
    values = torch.tensor([0.0, -0.0, 1e-30, 50.0, -50.0, 1e4, -1e4, 87.5, -87.5, 1e30, -1e30])
    one = _cpu.prepare(torch.ones(1, 1))
    y = _cpu.pruned_linear(values[:, None], one, 1, activation)[:, 0]
    reference = ACTIVATE[activation](values.double())
    torch.testing.assert_close(y.double(), reference, rtol=1e-6, atol=1e-30)


def test_leading_shapes_and_strides() -> None:
    layer = Layer(50, 40, 33, 29)
    x = random(2, 3, 5, 40)
    y = layer.check(x)
    assert torch.equal(y.reshape(-1, 50), layer.run(x.reshape(-1, 40)))
    assert torch.equal(layer.run(x[0, 0, 0]), y[0, 0, 0])
    wide = random(7, 100)
    for view in (wide[:, 3:43], wide[::2, 3:43], wide[:, ::2][:, :40], random(40, 7).t()):
        assert torch.equal(layer.run(view), layer.run(view.contiguous()))
    assert torch.equal(layer.run(x[0, 0, :1].expand(4, 40))[3], y[0, 0, 0])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_empty(dtype: torch.dtype) -> None:
    assert Layer(9, 7, 5, 3, dtype).run(random(0, 7, dtype=dtype)).shape == (0, 9)
    assert Layer(9, 7, 5, 3, dtype).run(random(2, 0, 7, dtype=dtype)).shape == (2, 0, 9)
    x = random(3, 7, dtype=dtype)
    assert torch.equal(Layer(9, 7, 0, 3, dtype).run(x), torch.zeros(3, 9, dtype=dtype))
    residual = random(3, 9, dtype=dtype)
    assert torch.equal(Layer(9, 7, 0, 3, dtype).run(x, "none", residual), residual)
    Layer(9, 7, 5, 0, dtype).check(x)
    assert Layer(0, 7, None, 3, dtype).run(x).shape == (3, 0)
    Layer(4, 0, 3, None, dtype).check(torch.empty(3, 0, dtype=dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weight_dtype", [F32, BF16], ids=["w32", "w16"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["x32", "x16"])
def test_removed_columns_do_not_leak(
    dtype: torch.dtype, weight_dtype: torch.dtype, bad: float
) -> None:
    layer = Layer(70, 61, 51, 45, weight_dtype)
    assert layer.columns is not None
    removed = torch.ones(61, dtype=torch.bool)
    removed[layer.columns.long()] = False
    clean = random(17, 61, dtype=dtype)
    clean[:, removed] = 0
    dirty = clean.clone()
    dirty[:, removed] = bad
    assert torch.equal(layer.run(dirty), layer.run(clean))
    dirty[3, layer.columns[7].item()] = bad
    y = layer.run(dirty)
    assert layer.rows is not None
    assert not y[3, layer.rows.long()].isfinite().any()
    assert y[4].isfinite().all()


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


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 150), label="out_features")
    k = data.draw(st.integers(1, 150), label="in_features")
    rows = data.draw(st.none() | st.integers(0, n), label="rows")
    columns = data.draw(st.none() | st.integers(0, k), label="columns")
    m = data.draw(st.integers(0, 40), label="m")
    dtype = data.draw(st.sampled_from([F32, BF16]), label="dtype")
    weight_dtype = data.draw(st.sampled_from([F32, BF16]), label="weight dtype")
    bias = data.draw(st.booleans(), label="bias")
    seed = data.draw(st.integers(0, 1000), label="seed")
    layer = Layer(n, k, rows, columns, weight_dtype, bias, seed)
    layer.check(random(m, k, dtype=dtype, seed=seed))


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


@pytest.mark.parametrize("weight_dtype", [F32, BF16], ids=["w32", "w16"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["x32", "x16", "xhalf"])
@pytest.mark.parametrize("m", [0, 1, 3, 30, 600])
def test_layers_of_one_input_together(
    m: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """Query, key, value: same columns, other columns, all columns, none; bitwise as alone."""
    layers = [
        Layer(50, 40, 33, 29, weight_dtype, seed=1),
        Layer(70, 40, 0, 29, weight_dtype, seed=2),
        Layer(0, 40, None, 29, weight_dtype, seed=2),
        Layer(20, 40, None, None, weight_dtype, seed=3),
        Layer(130, 40, 101, 31, F32, seed=4),
    ]
    columns = layers[0].columns
    assert columns is not None
    shared = _cpu.prepare(layers[0].weight[::2], None, None, columns, None, 40)
    x = random(m, 40, dtype=dtype)
    packed = [*(layer.packed for layer in layers), shared]
    sizes = [*(layer.out_features for layer in layers), 17]
    for y, p, n in zip(_cpu.pruned_linears(x, packed, sizes), packed, sizes, strict=True):
        assert torch.equal(y, _cpu.pruned_linear(x, p, n))
    strided = random(m, 80, dtype=dtype)[:, 7:47]
    for y, p, n in zip(_cpu.pruned_linears(strided, packed, sizes), packed, sizes, strict=True):
        assert torch.equal(y, _cpu.pruned_linear(strided, p, n))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("activation", list(ACTIVATE))
def test_gated_pair(activation: str, dtype: torch.dtype) -> None:
    weight_dtype = F32 if dtype is F16 else dtype
    gate = Layer(97, 900, 71, 701, weight_dtype, seed=1)
    up = _cpu.prepare(gate.weight.flip(0), gate.bias, gate.rows, gate.columns, 97, 900)
    assert gate.rows is not None
    assert gate.columns is not None

    def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
        kept = x.index_select(-1, gate.columns).to(dtype)
        w, b = gate.weight.to(dtype), gate.bias.to(dtype)
        z = ACTIVATE[activation](F.linear(kept, w, b)) * F.linear(kept, w.flip(0), b)
        return torch.zeros(*x.shape[:-1], 97, dtype=dtype).index_copy_(-1, gate.rows.long(), z)

    for m in (0, 1, 2, 5, 33):
        x = random(m, 900, dtype=dtype)
        y = _cpu.pruned_glu(x, gate.packed, up, 97, activation)
        assert_no_worse(y, plain(x, dtype), plain(x, torch.float64), 4 * gate.magnitude(x))
        if m == 33:
            assert torch.equal(_cpu.pruned_glu(x[20:21], gate.packed, up, 97, activation), y[20:21])


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


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("n", "k", "rows", "columns"), SHAPES)
def test_int8_weight(
    n: int, k: int, rows: int | None, columns: int | None, dtype: torch.dtype
) -> None:
    """Against the same formula with the dequantised weight, at every remainder of 4 columns."""
    plain = Layer(n, k, rows, columns)
    for cut in range(4):
        kept = plain.columns
        width = plain.weight.shape[1] - cut
        if width < 1 or (kept is None and cut):
            continue
        q, scale = _cpu.quantize_rows(plain.weight[:, :width])
        if kept is not None:
            kept = kept[:width]
        packed = _cpu.prepare(q, plain.bias, plain.rows, kept, n, k, scale)
        exact = Layer(n, k, rows, columns)
        exact.columns, exact.packed = kept, packed
        exact.weight = q.float() * scale[:, None]
        assert (exact.weight - plain.weight[:, :width]).abs().max() <= scale.max() * 0.5001
        for m in (1, 2, 5, 11, 30):
            exact.check(random(m, k, dtype=dtype), "gelu")
        x = random(30, k, dtype=dtype)
        y = exact.run(x)
        for row in (0, 7, 29):
            assert torch.equal(exact.run(x[row : row + 1]), y[row : row + 1])
        back = _cpu.unpack(packed)
        assert torch.equal(back.weight, q)
        assert back.scale is not None
        assert torch.equal(back.scale, scale)


def test_int8_pair_and_errors() -> None:
    gate, x = Layer(50, 40, 33, 29), random(7, 40)
    q, scale = _cpu.quantize_rows(gate.weight)
    packed = _cpu.prepare(q, gate.bias, gate.rows, gate.columns, 50, 40, scale)
    alone = _cpu.pruned_linear(x, packed, 50)
    product = _cpu.pruned_glu(x, packed, packed, 50)
    torch.testing.assert_close(product, F.silu(alone) * alone)
    q[3, 4] = -128
    with pytest.raises(ValueError, match="got -128"):
        _cpu.prepare(q, None, gate.rows, gate.columns, 50, 40, scale)
    with pytest.raises(ValueError, match="scale goes with an int8 weight"):
        _cpu.prepare(gate.weight, None, gate.rows, gate.columns, 50, 40, scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_int8_takes_finite_matrices_only(bad: float) -> None:
    weight = random(5, 7)
    weight[3, 2] = bad
    with pytest.raises(ValueError, match=r"weight must be finite .* got (nan|inf) in row 3"):
        _cpu.quantize_rows(weight)
    with pytest.raises(ValueError, match="weight must be 2-D, got 1-D"):
        _cpu.quantize_rows(weight[0])
    with pytest.raises(ValueError, match="weight must be on the CPU, got meta"):
        _cpu.quantize_rows(weight.to("meta"))


def test_int8_of_zeros_and_denormals() -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-44, 0.0], [-3e-38, 1e-38]])
    q, scale = _cpu.quantize_rows(weight)
    assert (scale > 0).all()
    assert ((q * scale[:, None] - weight).abs() <= scale[:, None] / 2).all()


def test_packed_memory_is_small() -> None:
    layer = Layer(2048, 2048, 1587, 1587, BF16)
    assert layer.packed.numel() <= 1.05 * 2 * layer.weight.numel()


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
