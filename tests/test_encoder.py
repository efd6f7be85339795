"""The op of a whole encoder layer: against its reference, invariant, and what it refuses.

``test_every_level`` runs this file again in a subprocess for each lower level.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from finegates import _native
from finegates.ops import (
    _cpu_blocks,
    encoder_layer,
    pack,
    reference,
    reference_blocks,
    schema,
    unpack,
    use_backend,
)
from finegates.report.timing import threads_set_to
from levels import LEVELS, run_capped
from numerics import assert_no_worse

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason()))

F32, BF16, I8 = torch.float32, torch.bfloat16, torch.int8


@dataclass(frozen=True)
class Layer:
    """Operands of one layer: unevenly pruned, nothing a multiple of a register."""

    packed: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    heads: int
    head_size: int
    inner: int
    eps: tuple[float, float] = (1e-5, 1e-2)
    activation: str = "gelu"

    @property
    def scale(self) -> float:
        return float(self.head_size**-0.5)

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return encoder_layer(
            x, self.packed, self.norms, self.eps, self.heads, self.head_size, self.scale,
            self.activation, mask,
        )  # fmt: skip

    def plain(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The reference at x's dtype; at fp64 everything is."""
        layers, norms = [unpack(p) for p in self.packed], self.norms
        if x.dtype == torch.float64:
            layers = [
                reference.Operands(*(t.double() if t is not None and t.is_floating_point() else t
                                     for t in layer))
                for layer in layers
            ]  # fmt: skip
            norms = tuple(n.double() for n in norms)
            mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
        return reference_blocks.encoder_layer(
            x, layers, self.inner, norms, self.eps, self.heads, self.head_size, self.scale,
            self.activation, mask,
        )  # fmt: skip


def make(
    heads: int = 3, head_size: int = 10, dtype: torch.dtype = F32, weight: torch.dtype = F32
) -> Layer:
    features, inner, width = 53, 71, heads * head_size

    def linear(k: int, n: int, *, pruned: bool = True) -> Tensor:
        rows = torch.randperm(n)[: n - n // 3].sort().values if pruned else torch.arange(n)
        columns = torch.randperm(k)[: k - k // 4].sort().values
        w = torch.randn(len(rows), len(columns)) * 2 / k**0.5
        return pack(w, torch.randn(len(rows)), rows.int(), columns.int(), n, k, dtype=weight)

    packed = (
        *(linear(features, width) for _ in range(3)),
        linear(width, features),
        linear(features, inner, pruned=False),
        linear(inner, features),
    )
    norms = tuple(torch.randn(features).to(dtype) for _ in range(4))
    return Layer(packed, norms, heads, head_size, inner)


def padding(lengths: list[int], most: int) -> Tensor:
    """Keep the first keys of each sequence: bool [B, 1, 1, S]."""
    return (torch.arange(most) < torch.tensor(lengths)[:, None])[:, None, None]


def additive(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)


@pytest.mark.parametrize("weight", [F32, BF16, I8], ids=["w32", "w16", "w8"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["x32", "x16"])
@pytest.mark.parametrize("length", [1, 5, 33])
def test_no_worse_than_the_reference(
    dtype: torch.dtype, weight: torch.dtype, length: int, threads: int
) -> None:
    layer = make(dtype=dtype, weight=weight)
    x = torch.randn(3, length, 53).to(dtype)
    assert_no_worse(layer(x), layer.plain(x), layer.plain(x.double()))


@pytest.mark.parametrize(("heads", "head_size"), [(1, 1), (2, 16), (1, 33), (4, 64), (1, 384)])
def test_heads_of_any_size(heads: int, head_size: int) -> None:
    layer = make(heads, head_size)
    x = torch.randn(2, 18, 53)
    assert_no_worse(layer(x), layer.plain(x), layer.plain(x.double()))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(activation: str) -> None:
    layer = replace(make(), activation=activation)
    x = torch.randn(2, 6, 53)
    assert_no_worse(layer(x), layer.plain(x), layer.plain(x.double()))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["x32", "x16"])
def test_masks(dtype: torch.dtype) -> None:
    """Padding, one mask for each row and head, and numbers that are added."""
    layer = make(dtype=dtype)
    x = torch.randn(2, 21, 53).to(dtype)
    keep = torch.rand(2, 3, 21, 21) < 0.6
    keep[..., 0] = True
    masks = [
        padding([21, 9], 21),
        keep,
        keep[:, :1],
        keep[0, 0],
        additive(keep, dtype),
        additive(padding([4, 21], 21), dtype),
        torch.randn(1, 3, 21, 21).to(dtype),
        torch.randn(21, 21).to(dtype).t(),
    ]
    for mask in masks:
        assert_no_worse(layer(x, mask), layer.plain(x, mask), layer.plain(x.double(), mask))


def test_more_keys_than_one_block() -> None:
    layer = make(heads=2)
    x = torch.randn(1, 801, 53)
    keep = torch.rand(1, 1, 801, 801) < 0.5
    keep[:, :, :400, :384] = False  # a whole block masked
    for mask in (None, keep, padding([700], 801)):
        assert_no_worse(layer(x, mask), layer.plain(x, mask), layer.plain(x.double(), mask))


@pytest.mark.parametrize("mask_dtype", [torch.bool, F32])
def test_a_row_that_keeps_no_key_attends_to_all(mask_dtype: torch.dtype) -> None:
    layer = make()
    x = torch.randn(2, 19, 53)
    keep = padding([19, 0], 19)
    mask = keep if mask_dtype == torch.bool else additive(keep, F32)
    assert_no_worse(layer(x, mask), layer.plain(x, mask), layer.plain(x.double(), mask))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["x32", "x16"])
def test_a_sequence_does_not_see_its_batch(dtype: torch.dtype) -> None:
    """Bitwise: batch, position, padding, form of the mask and threads."""
    layer = make(dtype=dtype)
    lengths = [7, 40, 1, 25, 40]
    x = torch.randn(5, 40, 53).to(dtype)
    alone = [layer(x[i : i + 1, :n].contiguous()) for i, n in enumerate(lengths)]
    keep = padding(lengths, 40)
    rows = keep.expand(-1, 3, 40, -1).contiguous()
    for threads in (1, 2, 3):
        with threads_set_to(threads):
            for mask in (keep, rows, additive(keep, dtype), additive(rows, dtype)):
                together = layer(x, mask)
                for i, n in enumerate(lengths):
                    assert torch.equal(together[i, :n], alone[i][0])


def test_long_batches_go_in_groups() -> None:
    layer = make()
    x = torch.randn(90, 16, 53)
    torch.testing.assert_close(layer(x)[77], layer(x[77:78])[0], rtol=0, atol=0)


def test_nan_stays_in_its_sequence() -> None:
    layer = make()
    x = torch.randn(3, 9, 53)
    clean = layer(x)
    x[1, 4] = float("nan")
    y = layer(x)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], clean[::2])


@pytest.mark.parametrize("shape", [(0, 5, 53), (2, 0, 53)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    assert make()(torch.randn(*shape)).shape == shape


def test_as_torch_sees_it() -> None:
    layer = make()
    x, keep = torch.randn(2, 6, 53), padding([6, 3], 6).expand(2, 3, 6, 6)
    args = (x, list(layer.packed), list(layer.norms), list(layer.eps), 3, 10, 0.3, "gelu", keep)
    torch.library.opcheck(schema.ops.encoder_layer.default, args)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, keep), layer(x, keep))


def test_backends_and_gradients() -> None:
    layer = make()
    x = torch.randn(2, 6, 53, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    with use_backend("torch"), torch.no_grad():
        assert torch.equal(layer(x), layer.plain(x))
    with use_backend("native"), torch.no_grad():
        torch.testing.assert_close(layer(x), layer.plain(x))


@pytest.mark.parametrize(
    ("change", "x", "mask", "message"),
    [
        ({}, torch.randn(4, 53), None, r"shape \[B, S, K\]"),
        ({}, torch.randn(1, 4, 52), None, "norms must be"),
        ({}, torch.randn(1, 4, 53).double(), None, "norms must be"),
        ({"norms": ()}, torch.randn(1, 4, 53), None, "norms must have 4 entries, got 0"),
        ({"activation": "tanh"}, torch.randn(1, 4, 53), None, "got 'tanh'"),
        ({"head_size": 11}, torch.randn(1, 4, 53), None, "out_features is 33"),
        ({"head_size": 385}, torch.randn(1, 4, 53), None, "must be 1 to 384, got 385"),
        ({"heads": -1}, torch.randn(1, 4, 53), None, r"outside \[0, 2\^30\]"),
        ({}, torch.randn(2, 4, 53), torch.ones(3, 1, 1, 4), r"broadcastable to \(2, 3, 4, 4\)"),
        ({}, torch.randn(1, 4, 53), torch.ones(4, 4).int(), "got torch.int32"),
    ],
)
def test_refusals(change: dict[str, Any], x: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make(), **change)(x, mask)


@pytest.mark.parametrize("name", ["norms", "mask", "packed"])
def test_operands_elsewhere(name: str) -> None:
    layer, mask = make(), torch.ones(4, 4)
    if name == "mask":
        mask = mask.to("meta")
    else:
        operands = getattr(layer, name)
        layer = replace(layer, **{name: (*operands[:-1], operands[-1].to("meta"))})
    with pytest.raises(ValueError, match=f"{name} must be .*meta"):
        layer(torch.randn(1, 4, 53), mask)


def test_impossible_sizes_and_null_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the extension itself refuses."""
    layer, x, mask, recorded = make(), torch.randn(1, 4, 53), torch.ones(4, 4), []
    native = vars(_native._C) | {"encoder_layer": lambda *args: recorded.extend(args)}
    with monkeypatch.context() as patch:
        patch.setattr(_cpu_blocks, "_C", SimpleNamespace(**native))
        layer(x, mask)

    def call(at: int, value: object) -> None:
        _native._C.encoder_layer(*recorded[:at], value, *recorded[at + 1 :])  # type: ignore[union-attr]

    with pytest.raises(ValueError, match="too many rows"):
        call(3, [2**30, 2**30, *recorded[3][2:]])
    for at, name in ((7, "x, y"), (8, "x, y"), (10, "mask")):
        with pytest.raises(ValueError, match=f"{name} .*null"):
            call(at, 0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["x32", "x16"])
def test_minus_infinity_throughout_is_nan(dtype: torch.dtype) -> None:
    """As in torch's softmax; the dtype's lowest number leaves an even row."""
    layer = make(dtype=dtype)
    x = torch.randn(2, 9, 53).to(dtype)
    rows = torch.zeros(9, 9, dtype=dtype)
    rows[3] = -torch.inf
    sequence = torch.zeros(2, 1, 1, 9, dtype=dtype)
    sequence[1] = -torch.inf
    for mask in (rows, sequence):
        ours, plain = layer(x, mask), layer.plain(x, mask)
        assert torch.equal(ours.isnan(), plain.isnan())
        assert 0 < ours.isnan().sum() < ours.numel()


def test_wrong_buffers() -> None:
    layer = make()
    for at in range(6):
        packed = list(layer.packed)
        packed[at] = pack(torch.randn(8, 9))
        with pytest.raises(ValueError, match="the packed layer"):
            replace(layer, packed=tuple(packed))(torch.randn(1, 4, 53))


@pytest.mark.parametrize("level", LEVELS)
def test_every_level(level: str) -> None:
    """The whole file again with the instruction set capped."""
    run_capped(__file__, level)
