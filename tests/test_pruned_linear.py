"""`PrunedLinear`: what is left of a Linear, on every backend that serves here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from finegates import PrunedLinear
from finegates.ops import pruned_linear, reference
from numerics import assert_no_worse
from pruned_case import BACKENDS, COLUMNS, ROWS, asking, example


def kept(size: int) -> st.SearchStrategy[list[int] | None]:
    return st.none() | st.sets(st.integers(0, size - 1), max_size=size).map(sorted)


@settings(max_examples=120)
@given(st.data())
def test_equals_the_linear_with_zeros(data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    rows, columns = (
        None if kept_ is None else torch.tensor(kept_, dtype=torch.int64)
        for kept_ in (data.draw(kept(n)), data.draw(kept(k)))
    )
    activation = data.draw(st.sampled_from(reference.ACTIVATIONS))
    linear = nn.Linear(k, n, data.draw(st.booleans()), dtype=dtype)
    pruned = PrunedLinear.from_linear(linear, rows, columns, activation)
    bare = PrunedLinear.from_linear(linear, rows, columns)
    dense = bare.to_linear()
    for layer in (bare, pruned):
        assert (layer.in_features, layer.out_features) == (k, n)
    x = torch.randn(*shape, k).to(dtype)
    act = reference.ACTIVATION_FUNCTIONS[activation]
    with torch.no_grad():
        exact = act(copy.deepcopy(dense).double()(x.double()))
        sums = x.double().abs() @ dense.weight.double().abs().t()
        magnitude = sums.max().item() if sums.numel() else 0.0
        assert_no_worse(pruned(x), act(dense(x)), exact, magnitude)
        if rows is not None:
            gone = torch.ones(n, dtype=torch.bool).index_fill(0, rows, False)
            assert (pruned(x)[..., gone] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [0, 1, 2, 33])
def test_backends_agree_with_the_rule(backend: str, dtype: torch.dtype, m: int) -> None:
    if backend == "native" and dtype == torch.float16:
        pytest.skip("the native backend refuses fp16 weights, see test_cpu_results.py")
    dense, pruned = example(dtype)
    x = torch.randn(m, 9).to(dtype)
    with torch.no_grad(), asking(backend):
        assert_no_worse(pruned(x), dense(x), copy.deepcopy(dense).double()(x.double()))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gradcheck(activation: str) -> None:
    """The op in grad mode is its reference; that is judged in fp64."""
    shapes = ((3, 7), (4, 5), (4,), (3, 6))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    rows, columns = (torch.tensor(kept).int() for kept in ([0, 2, 3, 5], [0, 1, 3, 5, 6]))

    def op(x: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> Tensor:
        return pruned_linear(x, w, b, rows, columns, 6, activation=activation, residual=residual)

    assert torch.autograd.gradcheck(op, leaves)


def test_round_trip_to_linear() -> None:
    linear = nn.Linear(9, 7)
    linear.weight.requires_grad_(False)
    pruned = PrunedLinear.from_linear(linear, ROWS, COLUMNS)
    assert not pruned.weight.requires_grad
    assert pruned.bias.requires_grad
    back = pruned.to_linear()
    mask = torch.zeros(7, 9, dtype=torch.bool)
    mask[ROWS[:, None], COLUMNS] = True
    assert torch.equal(back.weight[mask], linear.weight[mask])
    assert (back.weight[~mask] == 0).all()
    assert not back.weight.requires_grad
    again = PrunedLinear.from_linear(back, ROWS, COLUMNS)
    assert torch.equal(again.weight, pruned.weight)
    whole = PrunedLinear.from_linear(linear)
    assert whole.rows is None
    assert whole.columns is None
    assert torch.equal(whole.to_linear().weight, linear.weight)
    with pytest.raises(ValueError, match="activation must be 'none' to be a Linear, got 'silu'"):
        PrunedLinear.from_linear(linear, activation="silu").to_linear()


def test_from_linear_copies_and_leaves_the_source() -> None:
    linear = nn.Linear(9, 7).eval()
    before = linear.weight.detach().clone()
    for pruned in (PrunedLinear.from_linear(linear), PrunedLinear.from_linear(linear, ROWS)):
        with torch.no_grad():
            pruned.weight.zero_()
        assert torch.equal(linear.weight, before)
        assert pruned.training is False
    assert PrunedLinear.from_linear(nn.Linear(9, 7, bias=False), ROWS).bias is None
    with pytest.raises(TypeError, match="linear must be an nn.Linear, got Identity"):
        PrunedLinear.from_linear(nn.Identity())  # type: ignore[arg-type]


BAD_INDICES = [
    ([0, 7], r"must lie in \[0, 7\), got 7"),
    ([-1, 2], r"must lie in \[0, 7\), got -1"),
    ([2, 1], "must be sorted without duplicates, got 1 after 2"),
    ([0, 3, 3], "must be sorted without duplicates, got 3 after 3"),
    ([[0, 1]], "must be a 1-D int32 or int64 tensor, got torch.int64 with shape"),
    ([0.0, 1.0], "must be a 1-D int32 or int64 tensor, got torch.float32 with shape"),
    ([True, False], "must be a 1-D int32 or int64 tensor, got torch.bool with shape"),
]


@pytest.mark.parametrize(("indices", "message"), BAD_INDICES, ids=[str(i) for i, _ in BAD_INDICES])
@pytest.mark.parametrize("name", ["rows", "columns"])
def test_bad_indices(indices: Any, message: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} {message}") as error:
        PrunedLinear.from_linear(nn.Linear(7, 7), **{name: torch.tensor(indices)})
    assert "\n" not in str(error.value)


def test_list_of_indices_is_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match=r"rows must be a 1-D int32 or int64 tensor, got \[0, 1\]"):
        PrunedLinear.from_linear(nn.Linear(7, 7), rows=[0, 1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kept_rows": 8}, "kept_rows must be between 0 and 7, got 8"),
        ({"kept_rows": -1}, "kept_rows must be a whole number of at least 0, got -1"),
        ({"kept_columns": 10}, "kept_columns must be between 0 and 9, got 10"),
        ({"kept_columns": 2.0}, "kept_columns must be a whole number of at least 0, got 2.0"),
        ({"kept_rows": True}, "kept_rows must be a whole number of at least 0, got True"),
        ({"in_features": "9"}, "in_features must be a whole number of at least 0, got '9'"),
        ({"out_features": -7}, "out_features must be a whole number of at least 0, got -7"),
        ({"activation": "tanh"}, "activation must be one of .*, got 'tanh'"),
    ],
    ids=str,
)
def test_bad_constructor_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrunedLinear(**{"in_features": 9, "out_features": 7, **arguments})


@pytest.mark.parametrize(("indices", "message"), BAD_INDICES[:4], ids=str)
@pytest.mark.parametrize("assign", [True, False])
def test_bad_indices_in_a_state_dict(indices: list[int], message: str, assign: bool) -> None:
    model = nn.Sequential(PrunedLinear(7, 7, kept_rows=len(indices)))
    state = {**model.state_dict(), "0.rows": torch.tensor(indices, dtype=torch.int32)}
    with pytest.raises(ValueError, match=f"0.rows {message}"):
        model.load_state_dict(state, assign=assign)


def test_fresh_layer_is_initialised() -> None:
    layer = PrunedLinear(900, 70, kept_rows=40, kept_columns=400)
    bound = 1.0 / 400**0.5
    for parameter in layer.parameters():
        assert parameter.abs().max() <= bound
        assert parameter.std() > bound / 4
    assert torch.equal(layer.rows, torch.arange(40, dtype=torch.int32))
    assert torch.equal(layer.columns, torch.arange(400, dtype=torch.int32))


def test_state_dict_names_and_dtypes() -> None:
    _, pruned = example(torch.bfloat16)
    state = pruned.state_dict()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == {
        "weight": (torch.bfloat16, (4, 5)),
        "bias": (torch.bfloat16, (4,)),
        "rows": (torch.int32, (4,)),
        "columns": (torch.int32, (5,)),
    }
    assert list(PrunedLinear(9, 7, bias=False).state_dict()) == ["weight"]
    assert list(PrunedLinear(9, 7, kept_columns=3).state_dict()) == ["weight", "bias", "columns"]
    stored = safetensors.torch.save(state)
    twin = PrunedLinear(9, 7, 4, 5, dtype=torch.bfloat16)
    twin.load_state_dict(safetensors.torch.load(stored))
    x = torch.randn(3, 9).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(twin(x), pruned(x))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 10), r"x must have a last dimension of 9, got shape \(2, 10\)"),
        (torch.zeros(2, 5), r"x must have a last dimension of 9, got shape \(2, 5\)"),
        (torch.zeros(()), r"x must have a last dimension of 9, got shape \(\)"),
        (torch.zeros(2, 9, dtype=torch.bfloat16), "x must have w's dtype torch.float32, got"),
        (torch.zeros(2, 9, dtype=torch.int64), "x must have w's dtype torch.float32, got"),
        (torch.zeros(2, 9, device="meta"), "x must be on w's device cpu, got meta"),
    ],
    ids=["wider", "compact", "scalar", "bf16", "int", "device"],
)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_input(x: Tensor, message: str, grad: bool) -> None:
    _, pruned = example()
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message) as error:
        pruned(x)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_input(backend: str) -> None:
    dense, pruned = example()
    x = torch.randn(9, 4, 3).movedim(0, -1)
    wide = torch.randn(5, 18)[:, ::2]
    with torch.no_grad(), asking(backend):
        for view in (x, wide, torch.randn(1, 9).expand(6, 9), torch.randn(6, 9).flip(0)):
            torch.testing.assert_close(pruned(view), dense(view.contiguous()))


def test_moves_and_copies() -> None:
    _, pruned = example()
    x = torch.randn(3, 9)
    with torch.no_grad():
        before = pruned(x)
        twin = copy.deepcopy(pruned)
        twin.weight.zero_()
        assert torch.equal(pruned(x), before)
        assert pruned.train() is pruned
        assert pruned.eval() is pruned
        pruned.share_memory()
        assert all(t.is_shared() for t in pruned.state_dict().values())
        torch.testing.assert_close(pruned(x), before)
        half = copy.deepcopy(pruned).to(torch.bfloat16)
        assert half.rows.dtype == half.columns.dtype == torch.int32  # type: ignore[union-attr]
        assert half(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_meta_device() -> None:
    layer = PrunedLinear(9, 7, 4, 5, device="meta", dtype=torch.bfloat16)
    assert all(t.device.type == "meta" for t in layer.state_dict().values())
    x = torch.empty(2, 9, device="meta", dtype=torch.bfloat16)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert layer(x).shape == (2, 7)
    _, source = example(torch.bfloat16)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 9).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(layer(x), source(x))


def test_nothing_kept() -> None:
    """No row: zeros. No column: the bias alone."""
    none = torch.empty(0, dtype=torch.int64)
    linear = nn.Linear(9, 7)
    x = torch.randn(3, 9)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(PrunedLinear.from_linear(linear, rows=none)(x), torch.zeros(3, 7))
            y = PrunedLinear.from_linear(linear, columns=none)(x)
            assert torch.equal(y, linear.bias.expand(3, 7))
            both = PrunedLinear.from_linear(linear, none, none)
            assert torch.equal(both(x), torch.zeros(3, 7))
    assert both.to_linear().weight.shape == (7, 9)


def test_repr() -> None:
    _, pruned = example()
    assert "kept_rows=4, kept_columns=5, bias=True, activation='none'" in repr(pruned)
