"""The native CPU path with int8 weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cpu_layer import BF16, F16, F32, SHAPES, Layer, random
from finegates import _native
from finegates.ops import _cpu
from levels import LEVELS, run_capped

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason()))


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


@pytest.mark.parametrize("level", LEVELS)
def test_every_level(level: str) -> None:
    """The whole file again with the instruction set capped."""
    run_capped(__file__, level)
