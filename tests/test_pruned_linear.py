"""`PrunedLinear`: what is left of a Linear, on every backend that serves here."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from finegates import PrunedLinear, use_backend
from finegates.ops import packing, pruned_linear, reference, table
from numerics import assert_no_worse

NATIVE_REASON = next(why for op, name, why in table() if (op, name) == ("pruned_linear", "native"))
needs_native = pytest.mark.skipif(NATIVE_REASON is not None, reason=f"native: {NATIVE_REASON}")
# "default" asks for nothing, which opens the short way past the dispatcher.
BACKENDS = [
    pytest.param("default", id="default"),
    pytest.param("torch", id="torch"),
    pytest.param("native", id="native", marks=needs_native),
    pytest.param("auto", id="auto"),
]


def asking(backend: str) -> AbstractContextManager[None]:
    """Request a backend, or nothing at all."""
    return nullcontext() if backend == "default" else use_backend(backend)


ROWS = torch.tensor([0, 2, 3, 6])
COLUMNS = torch.tensor([1, 2, 5, 7, 8])


def example(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[nn.Linear, PrunedLinear]:
    """A dense Linear with zeros where the pruned one has nothing, and the pruned one."""
    linear = nn.Linear(9, 7, dtype=dtype).eval()
    pruned = PrunedLinear.from_linear(linear, ROWS, COLUMNS, **changes)
    return pruned.to_linear() if not changes else linear, pruned


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
        pytest.skip("the native backend refuses fp16 weights, see test_native.py")
    dense, pruned = example(dtype)
    x = torch.randn(m, 9).to(dtype)
    with torch.no_grad(), asking(backend):
        assert_no_worse(pruned(x), dense(x), copy.deepcopy(dense).double()(x.double()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_does_not_depend_on_threads(backend: str, threads: int) -> None:
    dense, pruned = example()
    x = torch.randn(130, 9)
    with torch.no_grad(), asking(backend):
        assert_no_worse(pruned(x), dense(x), copy.deepcopy(dense).double()(x.double()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_flow_whatever_the_backend(backend: str) -> None:
    """A native op without autograd would lose gradients silently."""
    dense, pruned = example()
    x, twin = (torch.randn(5, 9, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    x.requires_grad_()
    twin.requires_grad_()
    with asking(backend):
        y = pruned(x)
        y.square().sum().backward()
        frozen = copy.deepcopy(pruned).requires_grad_(False)
        frozen.zero_grad()
        (dx,) = torch.autograd.grad(frozen(x).square().sum(), x)
    dense(twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(dx, twin.grad)
    rows, columns = ROWS[:, None], COLUMNS
    torch.testing.assert_close(pruned.weight.grad, dense.weight.grad[rows, columns])  # type: ignore[index]
    torch.testing.assert_close(pruned.bias.grad, dense.bias.grad[ROWS])  # type: ignore[union-attr]


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


class TestPack:
    """The native backend's copy of the weight never outlives a change of the weight."""

    @pytest.fixture(autouse=True)
    def _inference(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    @staticmethod
    def check(pruned: PrunedLinear) -> None:
        x = torch.randn(3, 9).to(pruned.weight.dtype)
        exact = reference_of(copy.deepcopy(pruned).double(), x.double())
        # The layer's short way keeps a pack of its own, the op another one.
        for y in (pruned(x), op_of(pruned, x)):
            assert_no_worse(y, reference_of(pruned, x), exact)

    def test_in_place_change(self) -> None:
        _, pruned = example()
        self.check(pruned)
        pruned.weight.mul_(-3.0)
        self.check(pruned)
        assert pruned.bias is not None
        pruned.bias.add_(5.0)
        self.check(pruned)

    def test_optimizer_step(self) -> None:
        _, pruned = example()
        self.check(pruned)
        pruned.weight.grad = torch.ones_like(pruned.weight)
        torch.optim.SGD([pruned.weight], lr=1.0).step()
        self.check(pruned)

    @pytest.mark.parametrize("how", ["fused", "foreach", "plain"])
    def test_adamw_step(self, how: str) -> None:
        """The fused step, Trainer's default, raises no version counter."""
        _, pruned = example()
        flags = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {}}[how]
        optimizer = torch.optim.AdamW(pruned.parameters(), lr=1.0, **flags)
        for _ in range(3):
            self.check(pruned)
            for parameter in pruned.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            self.check(pruned)

    def test_trainer_evaluates_the_weight_of_the_step(self, tmp_path: Path) -> None:
        from transformers import Trainer, TrainingArguments

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = PrunedLinear.from_linear(nn.Linear(9, 7), ROWS, COLUMNS)

            def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
                y = self.layer(x)
                if not torch.is_grad_enabled():
                    torch.testing.assert_close(y, reference_of(self.layer, x))
                return {"loss": F.mse_loss(y, labels), "logits": y}

        data = [{"x": torch.randn(9), "labels": torch.randn(7)} for _ in range(8)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, eval_strategy="steps", eval_steps=1,
            learning_rate=1.0, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        with torch.enable_grad():
            Trainer(Model(), arguments, train_dataset=data, eval_dataset=data).train()

    @needs_native
    @pytest.mark.parametrize("how", ["cast", "meta", "replaced", "assigned"])
    def test_the_old_weight_is_let_go(self, how: str) -> None:
        _, pruned = example()
        self.check(pruned)
        entry = packing.entry(
            pruned.weight, pruned.bias, pruned.rows, pruned.columns, pruned.out_features, 9
        )
        old = weakref.ref(entry.sources[0])  # type: ignore[arg-type]
        del entry
        assert old() is not None
        x = torch.randn(3, 9)
        if how == "cast":
            pruned.to(torch.float64)
        elif how == "meta":
            pruned.to("meta")
        elif how == "replaced":
            pruned.weight = nn.Parameter(torch.randn(4, 5))
            with torch.enable_grad():
                pruned(x)
        else:
            pruned.load_state_dict(example()[1].state_dict(), assign=True)
            with torch.enable_grad():
                pruned(x)
        gc.collect()
        assert old() is None

    def test_load_state_dict(self) -> None:
        _, pruned = example()
        self.check(pruned)
        other = PrunedLinear.from_linear(nn.Linear(9, 7), ROWS - 0, COLUMNS - 1)
        pruned.load_state_dict(other.state_dict())
        self.check(pruned)

    def test_replaced_parameter_at_the_same_address(self) -> None:
        """The allocator gives a freed block to the next tensor of its size."""
        _, pruned = example()
        for _ in range(10):
            self.check(pruned)
            pruned.weight = nn.Parameter(torch.randn(4, 5))

    def test_cast_there_and_back(self) -> None:
        _, pruned = example()
        for _ in range(10):
            self.check(pruned)
            pruned.to(torch.bfloat16).to(torch.float32)
            self.check(pruned)
            pruned.weight.copy_(torch.randn(4, 5))

    def test_changed_sides(self) -> None:
        _, pruned = example()
        self.check(pruned)
        pruned.columns = pruned.columns - 1  # type: ignore[operator]
        self.check(pruned)
        pruned.columns.add_(1)
        self.check(pruned)

    def test_deepcopy(self) -> None:
        _, pruned = example()
        self.check(pruned)
        twin = copy.deepcopy(pruned)
        twin.weight.neg_()
        self.check(twin)
        self.check(pruned)

    def test_gradient_mode_and_inference_mode(self) -> None:
        _, pruned = example()
        self.check(pruned)
        with torch.inference_mode():
            x = torch.randn(3, 9)
            made = PrunedLinear.from_linear(nn.Linear(9, 7), ROWS, COLUMNS)
            for layer in (made, pruned):
                for call in (layer, lambda t, layer=layer: op_of(layer, t)):
                    torch.testing.assert_close(call(x), reference_of(layer, x))
            bare = PrunedLinear.from_linear(nn.Linear(9, 7, bias=False))
            for layer in (made, bare):
                layer(x), op_of(layer, x)
                layer.weight.neg_()  # no version counter tells of it
                torch.testing.assert_close(layer(x), reference_of(layer, x))
                torch.testing.assert_close(op_of(layer, x), reference_of(layer, x))

    def test_other_sizes_with_the_same_weight(self) -> None:
        _, pruned = example()
        for n, k in ((7, 9), (8, 9), (8, 10), (7, 9)):
            args = (torch.randn(2, k), pruned.weight, None, pruned.rows, pruned.columns, n)
            torch.testing.assert_close(pruned_linear(*args), reference.pruned_linear(*args))

    def test_the_pack_dies_with_the_layer(self) -> None:
        before = len(packing._entries)
        layers = [example()[1] for _ in range(5)]
        for layer in layers:
            self.check(layer)
        del layers, layer
        gc.collect()
        assert len(packing._entries) == before


def test_forward_of_every_kind_of_tracing_and_transform() -> None:
    """Where the short way would miss something, the op or the reference has to answer."""
    _, pruned = example()
    x, t = torch.randn(3, 9), torch.randn(3, 9)
    slope = reference.pruned_linear(t, pruned.weight, None, pruned.rows, pruned.columns, 7)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own use of torch.jit
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of the shape check
        expected = pruned(x)
        torch.testing.assert_close(pruned(torch._neg_view(-x)), expected)
        for function in (pruned, lambda x: op_of(pruned, x)):
            torch.testing.assert_close(torch.vmap(function)(x), expected)
            y, tangent = torch.func.jvp(function, (x,), (t,))
            torch.testing.assert_close((y, tangent), (expected, slope))
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, t)))
            torch.testing.assert_close((dual.primal, dual.tangent), (expected, slope))
        traced = torch.jit.trace(pruned, x)
        torch.testing.assert_close(traced(t), reference_of(pruned, t))


def test_batched_and_differentiated_weights() -> None:
    _, pruned = example()
    x = torch.randn(3, 9)
    parameters = dict(pruned.named_parameters())
    with torch.no_grad():
        pruned(x)

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(pruned, parameters, (x,)).square().sum()

        two = {name: torch.stack([p, 2.0 * p]) for name, p in parameters.items()}
        torch.testing.assert_close(torch.vmap(loss)(two)[1], 4.0 * loss(parameters))
        gradients = torch.func.grad(loss)(parameters)
    pruned(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("names", [["weight"], ["bias"], ["weight", "bias"]], ids=str)
def test_parametrized(names: list[str]) -> None:
    class Double(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return 2.0 * t

    _, pruned = example()
    x = torch.randn(3, 9)
    with torch.no_grad():
        pruned(x)
        for name in names:
            parametrize.register_parametrization(pruned, name, Double())
        torch.testing.assert_close(pruned(x), reference_of(pruned, x))
        assert pruned.double()(x.double()).dtype == torch.float64
    assert "kept_rows=4" in repr(pruned)


@pytest.mark.parametrize("backend", ["native", "triton", "typo"])
def test_a_layers_backend_is_never_ignored(backend: str) -> None:
    """A layer that names a backend without a backward can't train; a context's wish gives way."""
    _, pruned = example()
    pruned.backend = backend
    message = "backend must be one of" if backend == "typo" else "gradients are wanted and only"
    with pytest.raises(ValueError, match=message):
        pruned(torch.randn(3, 9))
    pruned.backend = "torch"
    pruned(torch.randn(3, 9)).sum().backward()


def op_of(pruned: PrunedLinear, x: Tensor) -> Tensor:
    return pruned_linear(
        x, pruned.weight, pruned.bias, pruned.rows, pruned.columns, pruned.out_features
    )


def reference_of(pruned: PrunedLinear, x: Tensor) -> Tensor:
    return reference.pruned_linear(
        x, pruned.weight, pruned.bias, pruned.rows, pruned.columns, pruned.out_features
    )


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


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(grad: bool, backend: str) -> None:
    dense, pruned = example()
    torch.compiler.reset()
    fast = torch.compile(pruned, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad), asking(backend):
        for shape in ((5, 9), (2, 3, 9)):
            x = torch.randn(shape)
            torch.testing.assert_close(fast(x), dense(x))
        # A compiled layer sees a changed weight too.
        with torch.no_grad():
            pruned.weight.neg_()
        torch.testing.assert_close(fast(x), reference_of(pruned, x))
    torch.compiler.reset()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_autocast_bf16(grad: bool) -> None:
    dense, pruned = example()
    x = torch.randn(33, 9)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        y, plain = pruned(x), dense(x)
    assert y.dtype == torch.bfloat16
    exact = F.linear(x.double(), dense.weight.double(), dense.bias.double())
    assert_no_worse(y, plain, exact)


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
