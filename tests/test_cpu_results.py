"""The native CPU path against fp64, at the instruction set this process chose.

``test_every_level``, here and in the files beside this one, runs the file again in a subprocess for
each lower level.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpu_layer import ACTIVATE, BF16, F16, F32, SHAPES, Layer, random
from finegates import _native
from finegates.ops import _cpu
from levels import LEVELS, run_capped
from numerics import assert_no_worse

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason()))


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


@pytest.mark.parametrize("case", ["plain", "residual", "pair"])
@pytest.mark.parametrize("weight_dtype", [F32, BF16, torch.int8], ids=["w32", "w16", "w8"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["x32", "x16", "xhalf"])
@pytest.mark.parametrize("activation", list(ACTIVATE))
def test_kept_nan_and_inf(
    activation: str, dtype: torch.dtype, weight_dtype: torch.dtype, case: str
) -> None:
    """NaN, Inf and -Inf of x and of the residual come out where PyTorch in fp64 has them."""
    layer = Layer(97, 65, 71, 43, F32 if weight_dtype is torch.int8 else weight_dtype)
    weight, scale, rows, columns = layer.weight, None, layer.rows, layer.columns
    assert rows is not None
    assert columns is not None
    if weight_dtype is torch.int8:
        weight, scale = _cpu.quantize_rows(weight)
    packed = _cpu.prepare(weight, layer.bias, rows, columns, 97, 65, scale)
    nan, inf = float("nan"), float("inf")
    x = random(19, 65, dtype=dtype)
    for row, values in ((2, [nan]), (5, [inf]), (8, [-inf]), (11, [inf, -inf]), (18, [-inf, nan])):
        x[row, columns[-len(values) :].long()] = torch.tensor(values, dtype=dtype)

    wide = weight.double() if scale is None else weight.double() * scale.double()[:, None]
    sums = F.linear(x[:, columns.long()].double(), wide, layer.bias.double())
    z = ACTIVATE[activation](sums)
    if activation != "none":  # their limit, where PyTorch multiplies -Inf by 0
        z = z.masked_fill(sums == -inf, 0)
    if case == "pair":
        y = _cpu.pruned_glu(x, packed, packed, 97, activation)
        z = z * sums
    elif case == "residual":
        residual = random(19, 97, dtype=dtype)
        residual[8], residual[14], residual[15] = inf, nan, -inf
        y = _cpu.pruned_linear(x, packed, 97, activation, residual)
    else:
        y = _cpu.pruned_linear(x, packed, 97, activation)
    expected = torch.zeros(19, 97, dtype=torch.float64).index_copy_(1, rows.long(), z)
    if case == "residual":
        expected += residual
    # Of a pair the limit times Inf is Inf or NaN.
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert (~expected.isfinite()).sum() > 71
    if case != "pair":
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y == inf, expected == inf)
    assert y[2, rows.long()].isnan().all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_denormals(dtype: torch.dtype) -> None:
    """A removed row passes the residual's on, bit for bit; a kept one adds them to the bias's."""
    layer = Layer(97, 65, 71, 43, dtype)
    assert layer.rows is not None
    smallest = torch.finfo(dtype).smallest_normal
    # A bf16 denormal is a multiple of 2^-133, and so is a sum of two.
    residual = torch.randint(-120, 120, (19, 97), generator=torch.Generator().manual_seed(2))
    residual = (residual * 2.0**-133).to(dtype)
    bias = torch.arange(71) % 8 * 2.0**-133
    packed = _cpu.prepare(layer.weight, bias, layer.rows, layer.columns, 97, 65)
    y = _cpu.pruned_linear(torch.zeros(19, 65, dtype=dtype), packed, 97, "none", residual)
    expected = residual.clone()
    kept = residual[:, layer.rows.long()] + bias.to(dtype)
    if dtype is BF16 and _native.isa() == "avx512bf16":
        kept[kept.abs() < smallest] = 0
    expected[:, layer.rows.long()] = kept
    assert (expected.abs() < smallest).any()
    assert torch.equal(y, expected)


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


@pytest.mark.parametrize("level", LEVELS)
def test_every_level(level: str) -> None:
    """The whole file again with the instruction set capped."""
    run_capped(__file__, level)
