"""`PackedLinear` is the layer it was made from, in one buffer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finegates import FusedGatedLinear, PrunedLinear
from finegates.serving import PackedLinear
from numerics import assert_no_worse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer_of(kind: str, dtype: torch.dtype = torch.float32) -> nn.Linear | PrunedLinear:
    linear = nn.Linear(37, 45, bias=kind != "no bias").to(dtype).eval()
    if kind != "pruned":
        return linear
    rows, columns = torch.arange(0, 45, 2), torch.arange(1, 37, 3)
    return PrunedLinear.from_linear(linear, rows, columns, activation="gelu")


def same_state(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return list(mine) == list(theirs) and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name])
        for name in mine
    )


@pytest.mark.parametrize("kind", ["linear", "no bias", "pruned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_and_way_back(kind: str, dtype: torch.dtype) -> None:
    layer = layer_of(kind, dtype)
    packed = PackedLinear(layer)
    x = torch.randn(5, 3, 37).to(dtype)
    with torch.no_grad():
        assert_no_worse(packed(x), layer(x), layer.double()(x.double()))
    again = packed.unpack()
    assert type(again) is type(layer)
    assert repr(again) == repr(layer)
    assert same_state(again, layer.to(dtype))
    assert same_state(packed, layer)
    assert torch.equal(packed.weight, layer.weight)
    assert (packed.bias is None) == (layer.bias is None)


def test_one_buffer_holds_everything() -> None:
    packed = PackedLinear(layer_of("pruned"))
    assert list(packed.parameters()) == []
    assert [name for name, _ in packed.named_buffers()] == ["packed"]


def test_int8_is_the_rounded_layer() -> None:
    layer = layer_of("linear")
    packed = PackedLinear(layer, weight_dtype="int8")
    scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    assert ((packed.weight - layer.weight).abs() <= scale / 2 * (1 + 1e-6)).all()
    rounded = nn.Linear(37, 45)
    rounded.load_state_dict(packed.state_dict())
    x = torch.randn(4, 37)
    with torch.no_grad():
        assert_no_worse(packed(x), rounded(x), rounded.double()(x.double()))


def test_state_dict_loads() -> None:
    first, second = layer_of("pruned"), layer_of("pruned")
    packed = PackedLinear(first)
    packed.load_state_dict(second.state_dict())
    assert same_state(packed, second)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        packed.load_state_dict(layer_of("linear").state_dict(), strict=False)


def test_follows_dtype_and_refuses_other_devices() -> None:
    layer = layer_of("pruned")
    packed = PackedLinear(layer).to(torch.bfloat16)
    assert same_state(packed, layer.to(torch.bfloat16))
    with pytest.raises(ValueError, match="stays on the CPU, got meta"):
        packed.to("meta")
    with pytest.raises(ValueError, match=r"can't be torch\.float64"):
        packed.double()
    assert same_state(packed, layer)


def test_copies_are_their_own() -> None:
    packed = PackedLinear(layer_of("linear"))
    copied = copy.deepcopy(packed)
    before = packed.state_dict()
    copied.load_state_dict(layer_of("linear").state_dict())
    assert torch.equal(packed.weight, before["weight"])
    assert not torch.equal(copied.weight, before["weight"])


def test_autocast_casts_x() -> None:
    packed = PackedLinear(layer_of("linear"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert packed(torch.randn(2, 37)).dtype == torch.bfloat16


def test_no_training_and_no_gradients() -> None:
    packed = PackedLinear(layer_of("linear").train())
    assert not packed.training
    assert packed.eval() is packed
    with pytest.raises(RuntimeError, match=r"finegates\.restore_"):
        packed.train()
    with pytest.raises(RuntimeError, match=r"call eval\(\)"):
        packed(torch.ones(1, packed.in_features))
    packed.eval()
    with pytest.raises(RuntimeError, match="no gradient"):
        packed(torch.randn(2, 37, requires_grad=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PackedLinear(nn.ReLU()), TypeError, "ReLU is neither"),  # type: ignore[arg-type]
        (lambda: PackedLinear(FusedGatedLinear(4, 4)), TypeError, "FusedGatedLinear is neither"),
        (lambda: PackedLinear(nn.Linear(4, 4).double()), ValueError, "float64"),
        (lambda: PackedLinear(nn.Linear(4, 4, device="meta")), ValueError, "on meta"),
        (lambda: PackedLinear(nn.Linear(4, 4), "int4"), ValueError, "got 'int4'"),
        (lambda: PackedLinear(nn.Linear(4, 4))(torch.ones(2, 5)), ValueError, "dimension 5"),
    ],
)
def test_errors(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_shared_parameters_stay_themselves() -> None:
    layer = layer_of("linear")
    packed = PackedLinear(layer, shared={"weight": layer.weight})
    state: dict[str, Tensor] = packed.state_dict()
    assert state["weight"].data_ptr() == layer.weight.data_ptr()
    assert packed.unpack().weight is layer.weight
