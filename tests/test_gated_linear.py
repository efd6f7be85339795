"""`FusedGatedLinear`: a drop-in Linear, under everything torch does to modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finegates import FusedGatedLinear, GateConfig
from numerics import assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
DTYPE_IDS = ["fp32", "bf16", "fp64"]
ALL = ("ranking", "gaussian", "hard_concrete")


def fill_(layer: FusedGatedLinear, logit: float) -> FusedGatedLinear:
    with torch.no_grad():
        for gate in (layer.row_gate, layer.column_gate):
            if gate is not None:
                gate.logits.fill_(logit)
    return layer


def mixed(n: int = 8, k: int = 6, **changes: Any) -> FusedGatedLinear:
    """A layer with closed and open gates, fractional ones where the distribution has them."""
    layer = FusedGatedLinear(k, n, config=GateConfig(**changes))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for gate in (layer.row_gate, layer.column_gate):
            if gate is not None:
                noise = torch.randn(gate.logits.shape, generator=g)
                gate.logits.copy_(noise + gate.config.closing_logit + 0.3)
                gate.logits[0] = gate.config.closing_logit - 0.1
    return layer


@pytest.fixture
def compiled() -> Iterator[Any]:
    """torch.compile without inductor's compiler, which takes seconds a call."""
    torch.compiler.reset()
    yield lambda module, backend="aot_eager": torch.compile(module, fullgraph=True, backend=backend)
    torch.compiler.reset()


@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_names(distribution: str, bias: bool) -> None:
    layer = FusedGatedLinear(6, 8, bias, config=GateConfig(distribution=distribution))
    expected = ["weight", *(["bias"] if bias else []), "row_gate.logits", "column_gate.logits"]
    assert list(layer.state_dict()) == expected
    assert all(type(v) is Tensor for v in layer.state_dict().values())
    stored = safetensors.torch.save(layer.state_dict())
    twin = FusedGatedLinear(6, 8, bias, config=GateConfig(distribution=distribution))
    twin.load_state_dict(safetensors.torch.load(stored))
    x = torch.randn(3, 6)
    assert torch.equal(twin.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_ungated_side_has_no_gate(side: str) -> None:
    layer = FusedGatedLinear(6, 8, config=GateConfig(**{side: False}))
    gate, other = ("row_gate", "column_gate") if side == "rows" else ("column_gate", "row_gate")
    assert getattr(layer, gate) is None
    assert list(layer.state_dict()) == ["weight", "bias", f"{other}.logits"]
    fill_(layer, -1.0)
    y = layer(torch.randn(3, 6))
    expected = torch.zeros(3, 8) if side == "columns" else layer.bias.expand(3, 8)
    assert torch.equal(y, expected)


def test_takes_the_arguments_of_linear() -> None:
    layer = FusedGatedLinear(6, 8, False, "cpu", torch.float64)
    assert layer.bias is None
    assert layer.weight.dtype == torch.float64
    assert isinstance(layer, nn.Linear)
    assert layer.config == GateConfig()
    assert "in_features=6, out_features=8, bias=False" in repr(layer)


def test_initial_weight_is_that_of_linear() -> None:
    torch.manual_seed(5)
    linear = nn.Linear(6, 8)
    torch.manual_seed(5)
    layer = FusedGatedLinear(6, 8)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize("training", [True, False])
def test_from_linear_shares_the_parameters(training: bool) -> None:
    linear = nn.Linear(6, 8, dtype=torch.bfloat16).train(training)
    layer = FusedGatedLinear.from_linear(linear, GateConfig())
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.training is training
    assert layer.row_gate is not None
    assert layer.row_gate.training is training
    assert layer.row_gate.logits.dtype == torch.float32
    assert FusedGatedLinear.from_linear(nn.Linear(6, 8, bias=False)).bias is None
    with pytest.raises(TypeError, match="linear must be an nn.Linear, got Conv1d"):
        FusedGatedLinear.from_linear(nn.Conv1d(1, 1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5), (33, 2, 1), (0,), (2, 0, 3)], ids=str)
def test_open_gates_are_the_linear_bit_for_bit(
    dtype: torch.dtype, bias: bool, distribution: str, shape: tuple[int, ...]
) -> None:
    linear = nn.Linear(65, 33, bias, dtype=dtype)
    layer = FusedGatedLinear.from_linear(linear, GateConfig(distribution=distribution))
    fill_(layer, 20.0).eval()
    x = torch.randn(*shape, 65).to(dtype)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, expected = layer(x), linear(x)
        assert y.dtype == dtype
        assert y.shape == (*shape, 33)
        assert torch.equal(y, expected)


VIEWS = {
    "sequence": lambda m, k: torch.randn(6, 50, k)[:, :m],
    "batch": lambda m, k: torch.randn(12, m, k)[::2],
    "first token": lambda m, k: torch.randn(6, m, k)[:, :1],
    "expanded batch": lambda m, k: torch.randn(1, m, k).expand(6, m, k),
    "expanded tokens": lambda m, k: torch.randn(6, 1, k).expand(6, m, k),
    "features": lambda m, k: torch.randn(6, m, 2 * k)[..., :k],
    "every other feature": lambda m, k: torch.randn(6, m, 2 * k)[..., ::2],
    "transposed": lambda m, k: torch.randn(m, 6, k).transpose(0, 1),
    "moved": lambda m, k: torch.randn(k, 6, m).movedim(0, -1),
    "4-D": lambda m, k: torch.randn(3, 4, m, k).transpose(0, 2)[:, :2, ::2],
    "matrix": lambda m, k: torch.randn(k, m).t()[::2],
    "vector": lambda m, k: torch.randn(2 * k)[::2],
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=[*DTYPE_IDS, "fp16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), [(384, 384), (768, 100), (100, 768)], ids=str)
def test_open_gates_are_the_linear_bit_for_bit_on_views(
    dtype: torch.dtype, bias: bool, n: int, k: int
) -> None:
    """``F.linear`` and BLAS choose by the strides of x in which order they sum."""
    linear = nn.Linear(k, n, bias, dtype=dtype)
    layer = fill_(FusedGatedLinear.from_linear(linear), 20.0).eval()
    for name, view in VIEWS.items():
        x = view(37, k)
        if dtype != torch.float32:
            memory = torch.as_strided(x, (x.untyped_storage().nbytes() // 4,), (1,), 0)
            x = torch.as_strided(memory.to(dtype), x.shape, x.stride())
        assert torch.equal(layer(x), linear(x)), name


def test_input_that_overlaps_itself() -> None:
    layer = mixed().eval()
    for x in (torch.randn(20).unfold(0, 6, 1), torch.randn(3, 1).expand(3, 6)):
        torch.testing.assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("change", [{"rows": False}, {}], ids=["columns only", "frozen rows"])
def test_an_in_place_activation_may_follow_untrained_row_gates(change: dict[str, Any]) -> None:
    layer = mixed(**change)
    if layer.row_gate is not None:
        layer.row_gate.requires_grad_(False)
    x = torch.randn(5, 6)
    for inplace in (True, False):
        layer.zero_grad()
        nn.Sequential(layer, nn.ReLU(inplace))(x).sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.requires_grad]
        if inplace:
            expected = gradients
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))  # type: ignore[arg-type]


def test_an_in_place_activation_after_trained_row_gates_is_refused() -> None:
    y = nn.Sequential(mixed(), nn.ReLU(inplace=True))(torch.randn(5, 6))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("distribution", ALL)
def test_torch_func(distribution: str) -> None:
    layer = mixed(distribution=distribution).eval()
    x, t = torch.randn(5, 6), torch.randn(5, 6)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own use of torch.jit
        _, tangent = torch.func.jvp(layer, (x,), (t,))
    torch.testing.assert_close(tangent, layer(x + t) - layer(x), rtol=1e-4, atol=1e-5)
    parameters = dict(layer.named_parameters())
    gradients = torch.func.grad(
        lambda p: torch.func.functional_call(layer, p, (x,)).square().sum()
    )(parameters)
    layer(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_closed_gates_are_exact_zeros(
    dtype: torch.dtype, distribution: str, training: bool
) -> None:
    layer = FusedGatedLinear(65, 33, dtype=dtype, config=GateConfig(distribution=distribution))
    fill_(layer, -20.0).train(training)
    y = layer(torch.randn(2, 5, 65).to(dtype))
    assert (y == 0).all()
    y.sum().backward()
    assert layer.weight.grad is not None
    assert (layer.weight.grad == 0).all()
    assert layer.bias.grad is not None
    assert (layer.bias.grad == 0).all()


@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_is_the_formula_with_the_gates_values(distribution: str, training: bool) -> None:
    layer = mixed(33, 65, distribution=distribution).double().train(training)
    assert layer.row_gate is not None
    assert layer.column_gate is not None
    x = torch.randn(2, 5, 65, dtype=torch.float64)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    r, c = layer.row_gate().double(), layer.column_gate().double()
    expected = F.linear(x * c, layer.weight, layer.bias) * r
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-14)
    assert (r == 0).any()
    dy = torch.randn_like(y)
    parameters = dict(layer.named_parameters())
    ours = torch.autograd.grad(y, list(parameters.values()), dy)
    theirs = torch.autograd.grad(expected, list(parameters.values()), dy)
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        # The logits' gradients come back in fp32.
        tolerance = 1e-5 if name.endswith("logits") else 1e-10
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("closed_gradient", [True, False])
def test_closed_ranking_rows_get_their_gradient_on_request(closed_gradient: bool) -> None:
    layer = mixed(closed_gradient=closed_gradient)
    layer(torch.randn(5, 6)).square().sum().backward()
    for gate in (layer.row_gate, layer.column_gate):
        assert gate is not None
        assert gate.logits.grad is not None
        closed = gate.value() == 0
        open_rows = gate.logits.grad[~closed]
        assert (open_rows != 0).all()
    # Outputs of closed rows are 0, so that the square has no slope there; a sum has.
    layer.zero_grad()
    layer(torch.randn(5, 6)).sum().backward()
    for gate in (layer.row_gate, layer.column_gate):
        assert gate is not None
        assert gate.logits.grad is not None
        closed = gate.value() == 0
        assert ((gate.logits.grad[closed] != 0) == closed_gradient).all()


@settings(max_examples=60)
@given(st.data())
def test_any_shape_and_pattern(data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4)))
    layer = FusedGatedLinear(k, n, data.draw(st.booleans())).eval()
    rows, columns = (
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
        for size in (n, k)
    )
    assert layer.row_gate is not None
    assert layer.column_gate is not None
    with torch.no_grad():
        layer.row_gate.logits.copy_(rows * 2.0 - 1.0)
        layer.column_gate.logits.copy_(columns * 2.0 - 1.0)
    x = torch.randn(*shape, k)
    y = layer(x)
    plain = F.linear(x * columns, layer.weight, layer.bias) * rows
    bias = None if layer.bias is None else layer.bias.double()
    exact = F.linear(x.double() * columns, layer.weight.double(), bias) * rows
    magnitude = (x.abs() @ layer.weight.abs().t()).amax().item() if x.numel() else 0.0
    assert_no_worse(y, plain, exact, magnitude)
    assert (y[..., ~rows] == 0).all()


def test_non_contiguous_input() -> None:
    layer = mixed().eval()
    x = torch.randn(6, 4, 3)
    assert torch.equal(layer(x.movedim(0, -1)), layer(x.movedim(0, -1).contiguous()))
    assert torch.equal(layer(torch.ones(1, 6).expand(5, 6)), layer(torch.ones(5, 6)))
    assert torch.equal(layer(torch.randn(4, 12)[:, ::2].flip(0)).isnan().any(), torch.tensor(False))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 7), r"x must have a last dimension of 6, got shape \(2, 7\)"),
        (torch.zeros(()), r"x must have a last dimension of 6, got shape \(\)"),
        (torch.zeros(2, 6, dtype=torch.float64), "x must have w's dtype torch.float32, got"),
        (torch.zeros(2, 6, dtype=torch.int64), "x must have w's dtype torch.float32, got"),
        (torch.zeros(2, 6, device="meta"), "x must be on w's device cpu, got meta"),
    ],
    ids=["width", "scalar", "fp64", "int", "device"],
)
def test_bad_input(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        mixed()(x)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_leave_the_logits(dtype: torch.dtype) -> None:
    layer = mixed(distribution="gaussian")
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    layer.to(dtype)
    for name, parameter in layer.named_parameters():
        if name.endswith("logits"):
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, before[name].to(dtype))
    layer.eval()(torch.randn(2, 6).to(dtype)).sum().backward()
    layer.train()(torch.randn(2, 6).to(dtype)).sum().backward()


def test_deepcopy_is_independent() -> None:
    layer = mixed().eval()
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 6)
    before = layer(x)
    assert torch.equal(twin(x), before)
    fill_(twin, -1.0)
    twin.weight.data.zero_()
    assert torch.equal(layer(x), before)


def test_train_eval_and_requires_grad_chain() -> None:
    layer = mixed()
    assert layer.eval() is layer
    assert layer.train() is layer
    assert layer.requires_grad_(False) is layer
    assert not layer(torch.randn(2, 6)).requires_grad
    assert layer.row_gate is not None
    assert layer.eval().row_gate.training is False


def test_meta_device_and_materialisation() -> None:
    layer = FusedGatedLinear(6, 8, device="meta", dtype=torch.bfloat16)
    assert all(p.device.type == "meta" for p in layer.parameters())
    x = torch.empty(3, 6, device="meta", dtype=torch.bfloat16)
    for training in (True, False):
        assert layer.train(training)(x).shape == (3, 8)
    with torch.device("meta"):
        assert FusedGatedLinear(6, 8).column_gate.logits.device.type == "meta"  # type: ignore[union-attr]
    source = mixed().to(torch.bfloat16)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 6).to(torch.bfloat16)
    assert torch.equal(layer.eval()(x), source.eval()(x))


def test_share_memory() -> None:
    layer = mixed().share_memory()
    assert all(p.is_shared() for p in layer.parameters())
    layer(torch.randn(2, 6)).sum().backward()


@pytest.mark.parametrize("distribution", ALL)
def test_autocast_bf16(distribution: str) -> None:
    layer = mixed(distribution=distribution).eval()
    x = torch.randn(7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    exact = copy.deepcopy(layer).double()(x.double())
    assert_no_worse(y, cast(x.to(torch.bfloat16)), exact)
    y.float().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
    linear = nn.Linear(6, 8)
    opened = fill_(FusedGatedLinear.from_linear(linear), 1.0).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(opened(x), linear(x))


@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_recomputes_the_same_gates(distribution: str, use_reentrant: bool) -> None:
    model = nn.Sequential(mixed(8, 6, distribution=distribution), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(5, 6, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(11)
        model.zero_grad()
        y = (
            checkpoint(model, x, use_reentrant=use_reentrant, preserve_rng_state=True)
            if checkpointed
            else model(x)
        )
        torch.randn(3)  # other draws between forward and backward
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])  # type: ignore[union-attr]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    assert any((g != 0).any() for g in gradients[0])


@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_to_one_graph(distribution: str, training: bool, compiled: Any) -> None:
    layer = mixed(distribution=distribution).train(training)
    twin = copy.deepcopy(layer)
    fast = compiled(layer)
    for shape in ((5, 6), (2, 3, 6), (5, 6)):
        x = torch.randn(shape)
        torch.manual_seed(2)
        y = fast(x)
        torch.manual_seed(2)
        expected = twin(x)
        torch.testing.assert_close(y, expected)
        layer.zero_grad()
        twin.zero_grad()
        y.square().sum().backward()
        expected.square().sum().backward()
        for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_compiled_samples_are_fresh_and_reproducible(compiled: Any) -> None:
    fast = compiled(mixed(distribution="gaussian"))
    x = torch.randn(5, 6)
    torch.manual_seed(2)
    first, second = fast(x), fast(x)
    torch.manual_seed(2)
    assert torch.equal(fast(x), first)
    assert not torch.equal(first, second)


# Inductor imports torch.utils.mkldnn, which uses what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiles_with_inductor(compiled: Any) -> None:
    layer = mixed(distribution="gaussian").eval()
    fast = compiled(layer, "inductor")
    x = torch.randn(5, 6)
    torch.testing.assert_close(fast(x), layer(x))


def test_inference_mode() -> None:
    layer = mixed(distribution="hard_concrete")
    x = torch.randn(5, 6)
    expected = layer.eval()(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


def test_results_do_not_depend_on_threads(threads: int) -> None:
    layer = fill_(FusedGatedLinear(129, 65), 1.0).eval()
    x = torch.ones(3, 129)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_backend_of_the_config_reaches_the_op() -> None:
    with pytest.raises(ValueError, match="backend='triton' can't run gated_linear: x is on cpu"):
        mixed(backend="triton")(torch.randn(2, 6))
