"""Packed layers as ops: against the reference, as torch sees them, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finegates import _native
from finegates.ops import (
    _cpu,
    pack,
    packed_embedding,
    packed_glu,
    packed_linear,
    packed_linears,
    reference,
    schema,
    unpack,
    use_backend,
)
from numerics import assert_no_worse

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason()))

F32, F64, BF16, F16, I8 = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8
)  # fmt: skip
N, K = 70, 90
ROWS = torch.arange(N)[torch.arange(N) % 3 != 1].int()
COLUMNS = torch.arange(K)[torch.arange(K) % 5 != 2].int()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    """A packed layer with kept rows and columns and a bias."""
    w = random(len(ROWS), len(COLUMNS), seed=seed) / K**0.5
    return pack(w, random(len(ROWS), seed=seed + 1), ROWS, COLUMNS, N, K, dtype=dtype)


def exact(packed: Tensor) -> reference.Operands:
    """What is packed, in fp64."""
    w, b, rows, columns, scale = unpack(packed)
    assert b is not None
    return reference.Operands(
        w.double(), b.double(), rows, columns, None if scale is None else scale.double()
    )


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("weight_dtype", [F32, BF16, I8], ids=["w32", "w16", "w8"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["x32", "x16", "xhalf"])
def test_no_worse_than_the_reference(
    dtype: torch.dtype, weight_dtype: torch.dtype, backend: str
) -> None:
    packed = layer(weight_dtype)
    gate, up = layer(weight_dtype, 2), layer(weight_dtype, 4)
    x, residual = random(2, 3, K).to(dtype), random(2, 3, N).to(dtype)
    # The kernels multiply bf16 by bf16 where the reference would widen int8 to fp32.
    magnitude = 2 * x.double().abs().sum(-1).max().item()
    with torch.no_grad(), use_backend(backend):
        y = packed_linear(x, packed, N, "gelu", residual)
        glu = packed_glu(x, gate, up, N)
        together = packed_linears(x, [packed, gate], [N, N])
        alone = [packed_linear(x, p, N) for p in (packed, gate)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert_no_worse(
        y,
        reference.packed_linear(x, unpack(packed), N, "gelu", residual),
        reference.packed_linear(x.double(), exact(packed), N, "gelu", residual.double()),
        magnitude,
    )
    assert_no_worse(
        glu,
        reference.packed_glu(x, unpack(gate), unpack(up), N),
        reference.packed_glu(x.double(), exact(gate), exact(up), N),
        magnitude,
    )


def test_a_dense_layer_is_a_linear() -> None:
    w, b, x = random(33, 17), random(33), random(5, 17)
    y = packed_linear(x, pack(w, b), 33)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w, b))


def test_what_pack_keeps() -> None:
    w = random(4, 6)
    assert torch.equal(unpack(pack(w)).weight, w)
    assert torch.equal(unpack(pack(w, dtype=BF16)).weight, w.bfloat16())
    assert torch.equal(unpack(pack(w.half())).weight, w.half().float())
    q, _, _, _, scale = unpack(pack(w, dtype=I8))
    assert scale is not None
    assert ((q * scale[:, None] - w).abs() <= scale[:, None] / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("weight_dtype", [F32, I8], ids=["w32", "w8"])
def test_opcheck(weight_dtype: torch.dtype) -> None:
    packed, x = layer(weight_dtype), random(2, 3, K)
    for residual in (None, random(2, 3, N)):
        torch.library.opcheck(schema.ops.packed_linear.default, (x, packed, N, "silu", residual))
    torch.library.opcheck(schema.ops.packed_linears.default, (x, [packed, packed], [N, N]))
    torch.library.opcheck(schema.ops.packed_glu.default, (x, packed, packed, N, "silu"))


def test_compiles_without_a_break() -> None:
    packed = layer()

    def block(x: Tensor) -> Tensor:
        a, b = packed_linears(x, [packed, packed], [N, N])
        return (
            packed_linear(packed_glu(x, packed, packed, N)[..., :1] + x, packed, N, "relu", a) + b
        )

    x = random(4, K)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), block(x))
        assert torch.equal(compiled(x[:3]), block(x[:3]))


def test_gradients_are_not_lost() -> None:
    """The native ops have no autograd: with gradients wanted the reference must serve."""
    packed, x, residual = layer(), random(3, K), random(3, N)

    def gradient(call: Any, of: Tensor) -> Tensor:
        of = of.clone().requires_grad_()
        call(of).square().sum().backward()
        assert of.grad is not None
        assert (of.grad != 0).any()
        return of.grad

    operands = unpack(packed)
    for ours, law, of in (
        (
            lambda t: packed_linear(t, packed, N, "gelu"),
            lambda t: reference.packed_linear(t, operands, N, "gelu"),
            x,
        ),
        (
            lambda t: packed_linear(x, packed, N, "none", t),
            lambda t: reference.packed_linear(x, operands, N, "none", t),
            residual,
        ),
        (
            lambda t: packed_glu(t, packed, packed, N),
            lambda t: reference.packed_glu(t, operands, operands, N),
            x,
        ),
        (
            lambda t: packed_linears(t, [packed], [N])[0],
            lambda t: reference.packed_linears(t, [operands], [N])[0],
            x,
        ),
    ):
        assert torch.equal(gradient(ours, of), gradient(law, of))


def test_transforms_run_the_reference() -> None:
    packed, x = layer(), random(3, K)
    batched = torch.func.vmap(lambda row: packed_linear(row, packed, N))(x)
    torch.testing.assert_close(batched, packed_linear(x, packed, N))


def test_autocast_casts_x_and_the_residual() -> None:
    packed, x, residual = layer(BF16), random(3, K), random(3, N)
    with torch.no_grad():
        expected = packed_linear(x.bfloat16(), packed, N, "none", residual.bfloat16())
        glu = packed_glu(x.bfloat16(), packed, packed, N)
        with torch.autocast("cpu", BF16):
            assert torch.equal(packed_linear(x, packed, N, "none", residual), expected)
            assert torch.equal(packed_glu(x, packed, packed, N), glu)
            assert torch.equal(packed_linears(x, [packed], [N])[0], packed_linear(x, packed, N))


def test_doubles_run_on_torch_alone() -> None:
    packed, x = layer(), random(3, K).double()
    y = packed_linear(x, packed, N)
    assert y.dtype == F64
    assert torch.equal(y, reference.packed_linear(x, unpack(packed), N))
    with use_backend("native"), pytest.raises(ValueError, match="can't run packed_linear: x is"):
        packed_linear(x, packed, N)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, p: packed_linear(x, p, N, "tanh"), ValueError, "activation must be one of"),
        (lambda x, p: packed_glu(x, p, p, N, "tanh"), ValueError, "activation must be one of"),
        (lambda x, p: packed_linear(x, p, N, "none", x), ValueError, "residual must "),
        (lambda x, p: packed_linear(x, p.float(), N), ValueError, "packed must be a 1-D uint8"),
        (lambda x, p: packed_linear(x, p[:-64], N), ValueError, "packed buffer: "),
        (lambda x, p: packed_linears(x, [p], [N, N]), ValueError, "one length of at most 8, got 1"),
        (lambda x, p: packed_linears(x, [p] * 9, [N] * 9), ValueError, "at most 8, got 9 and 9"),
        (lambda x, p: packed_linear(x, p, -1), ValueError, "out_features "),
        (lambda x, p: packed_linear(x, p.to("meta"), N), ValueError, "meta"),
        (lambda x, p: packed_linears(x, [p, p.to("meta")], [N, N]), ValueError, "meta"),
        (lambda x, p: packed_linear(x[0, 0], p, N), TypeError, "got 0-D torch.float32"),
        (lambda x, p: packed_linears(x[0, 0], [p], [N]), TypeError, "got 0-D torch.float32"),
        (lambda x, p: packed_linear(x.int(), p, N), TypeError, "got 2-D torch.int32"),
        (lambda x, p: packed_linear(x.to("meta"), p, N), ValueError, "device cpu, got meta"),
    ],
)
def test_refuses(call: Any, error: type[Exception], message: str, backend: str) -> None:
    with use_backend(backend), pytest.raises(error, match=message):
        call(random(3, K), layer())


def test_pack_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    w = random(3, 4)
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch.float64"):
        pack(w, dtype=F64)
    with pytest.raises(ValueError, match="weight must be a float tensor, got torch.int8"):
        pack(w.to(I8), dtype=I8)
    with pytest.raises(ValueError, match=r"rows has 2 entries, the weight 3"):
        pack(w, rows=torch.tensor([0, 1]), out_features=5, dtype=I8)
    for dtype in (None, I8):
        with pytest.raises(ValueError, match="weight must be 2-D, got 1-D"):
            pack(w[0], dtype=dtype)
    w[2, 1] = float("nan")
    with pytest.raises(ValueError, match="weight must be finite to become int8, got nan in row 2"):
        pack(w, dtype=I8)
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "_reason", "extension not built: no compiler")
    with pytest.raises(ValueError, match="weight can't be packed: extension not built"):
        pack(w)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("weight_dtype", [F32, BF16, I8], ids=["w32", "w16", "w8"])
@pytest.mark.parametrize("columns", [1, 6, 7])
def test_embedding_returns_rows(columns: int, weight_dtype: torch.dtype, backend: str) -> None:
    packed = pack(random(N, columns), random(N), dtype=weight_dtype)
    w, _, _, _, scale = unpack(packed)
    w = w if scale is None else w * scale[:, None]
    for ids in (
        torch.tensor([[0, N - 1], [33, 33]]),
        torch.tensor(31).int(),
        torch.empty(0, 2).int(),
    ):
        for dtype in (F32, BF16, F16):
            with use_backend(backend):
                y = packed_embedding(ids, packed, columns, dtype)
            assert torch.equal(y, torch.nn.functional.embedding(ids, w).to(dtype))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("bad", [-1, N, -(2**63), 2**63 - 1])
def test_embedding_refuses_rows_that_are_not_there(bad: int, backend: str) -> None:
    packed = pack(random(N, K))
    with use_backend(backend), pytest.raises(IndexError):
        packed_embedding(torch.tensor([0, bad]), packed, K, F32)


def test_embedding_refusals() -> None:
    packed, ids = pack(random(N, K)), torch.tensor([1])
    for args, message in (
        ((ids.float(), packed, K, F32), "ids must be int32 or int64, got torch.float32"),
        ((ids, packed, K, torch.int8), "dtype must be a float type, got torch.int8"),
        ((ids.to("meta"), packed, K, F32), "ids must be on packed's device cpu, got meta"),
        ((ids, packed, K + 1, F32), f"keep all of its {N} rows and of {K + 1} columns"),
        ((ids, layer(), K, F32), f"keep all of its {N} rows and of {K} columns"),
        ((ids, packed[:-1], K, F32), "packed buffer"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_embedding(*args)


def test_embedding_as_torch_sees_it() -> None:
    torch.library.opcheck(
        schema.ops.packed_embedding.default, (torch.tensor([[1, 2]]), pack(random(N, K)), K, BF16)
    )


def test_int8_is_rounded_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    w = random(N, K)
    whole = unpack(pack(w, dtype=I8))
    monkeypatch.setattr(_cpu, "_QUANTIZED_AT_ONCE", 3 * K + 1)
    blocks = unpack(pack(w, dtype=I8))
    assert torch.equal(whole.weight, blocks.weight)
    torch.testing.assert_close(whole.scale, blocks.scale, rtol=0, atol=0)
    w[N - 1, 0] = torch.inf
    with pytest.raises(ValueError, match=f"got inf in row {N - 1}"):
        pack(w, dtype=I8)
