"""The public ops and the gated layer on the Triton backend, in the interpreter."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finegates import FusedGatedLinear, GateConfig, GateMap, gate_, use_backend
from finegates.gates import Gate
from finegates.kernels import launch
from finegates.ops import (
    _triton,
    _triton_gated,
    dispatch,
    gated_linear,
    gated_matmul,
    norm_gather,
    open_mass,
    pruned_linear,
    reference,
    schema,
)
from finegates.surgery import GateController
from finegates.surgery.shrink import shrink_
from gated_case import make
from launches import Launches
from numerics import assert_no_worse
from tiny_models import build, inputs, scatter_gates_

DTYPES = [torch.float32, torch.float16]
DTYPE_IDS = ["fp32", "fp16"]
DISTRIBUTIONS = ["gaussian", "hard_concrete", "ranking"]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("closed_row_grad", [True, False])
@pytest.mark.parametrize(
    ("given", "present"),
    [
        (given, present)
        for given in ("brc", "rc", "r", "c", "b")
        for present in ("xwbrc", "xbrc", "xrc", "rc", "b", "xwrc")
        if set(present) & {*"xw", *given}
    ],
)
def test_gated_linear(given: str, present: str, closed_row_grad: bool, dtype: torch.dtype) -> None:
    """Given gate values, closed ones included: forward and every gradient that is wanted."""
    g = torch.Generator().manual_seed(0)
    m, n, k = 35, 70, 67
    shapes = {"x": (m, k), "w": (n, k), "b": (n,), "r": (n,), "c": (k,)}
    named = {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    for gate in "rc":
        named[gate] = named[gate].abs().clamp(max=1.0) * (named[gate].abs() > 0.4)
    named = {
        name: tensor.to(dtype).requires_grad_(name in present)
        for name, tensor in named.items()
        if name in "xw" or name in given
    }
    dy = torch.randn(m, n, generator=g).to(dtype)
    wanted = [name for name in named if name in present]

    def run(inputs: dict[str, Tensor], dy: Tensor, backend: str) -> list[Tensor]:
        y = gated_linear(**inputs, closed_row_grad=closed_row_grad, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, [inputs[name] for name in wanted], dy)]

    exact_inputs = {
        k: v.detach().double().requires_grad_(v.requires_grad) for k, v in named.items()
    }
    ours, plain = run(named, dy, "triton"), run(named, dy, "torch")
    exact = run(exact_inputs, dy.double(), "torch")
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_no_worse(a, b, c)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("maps", ["rows", "columns", "both", "none"])
@pytest.mark.parametrize("m", [1, 70])
def test_pruned_linear(m: int, maps: str, activation: str, dtype: torch.dtype) -> None:
    n_out, k_in = 150, 140
    rows = torch.randperm(n_out)[:90].sort().values.int()
    columns = torch.randperm(k_in)[:83].sort().values.int()
    rows_, columns_ = (
        rows if maps in ("rows", "both") else None,
        columns if maps in ("columns", "both") else None,
    )
    n = n_out if rows_ is None else 90
    k = k_in if columns_ is None else 83
    x = torch.randn(2, m, k_in).to(dtype)
    w = (torch.randn(n, k) / 9).to(dtype)
    for b, residual in (
        (torch.randn(n).to(dtype), torch.randn(2, m, n_out).to(dtype)),
        (None, None),
    ):
        args = (x, w, b, rows_, columns_, n_out)
        if columns_ is not None:
            removed_columns = torch.ones(k_in, dtype=torch.bool)
            removed_columns[columns_.long()] = False
            x[..., removed_columns] = float("nan")
        y = pruned_linear(*args, activation=activation, residual=residual, backend="triton")
        wide = [None if t is None else t.double() for t in (w, b, residual)]
        exact = reference.pruned_linear(
            x.double(), wide[0], wide[1], rows_, columns_, n_out, activation, wide[2]
        )
        assert_no_worse(y, reference.pruned_linear(*args, activation, residual), exact)
        if rows_ is not None and residual is None:
            removed = torch.ones(n_out, dtype=torch.bool)
            removed[rows_.long()] = False
            assert not y[..., removed].any()


def test_aligned_copy_follows_the_weight() -> None:
    columns = torch.tensor([0, 2, 3], dtype=torch.int32)
    x, w = torch.randn(2, 5), torch.randn(4, 3)
    for _ in range(2):
        for backend in ("triton", "torch"):
            y = pruned_linear(x, w, None, None, columns, backend=backend)
            torch.testing.assert_close(y, x[:, columns.long()] @ w.t())
        w.mul_(2.0)
        columns[2] = 4


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_pruned_linear_of_almost_nothing(kept: int) -> None:
    rows = torch.tensor([3, 60], dtype=torch.int32)[:kept]
    x, w, residual = torch.randn(5, 66), torch.randn(kept, 66), torch.randn(5, 100)
    y = pruned_linear(x, w, None, rows, None, 100, residual=residual, backend="triton")
    exact = reference.pruned_linear(x, w, None, rows, None, 100, "none", residual)
    torch.testing.assert_close(y, exact, atol=1e-5, rtol=0)
    columns = torch.tensor([5, 65], dtype=torch.int32)[:kept]
    for m in (0, 3, 70):
        x, b = torch.randn(m, 66), torch.randn(7)
        y = pruned_linear(x, torch.ones(7, kept), b, None, columns, backend="triton")
        expected = x[:, columns.long()].sum(1, keepdim=True) + b
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("k", [1100, 66, 1])
def test_norm_gather(k: int, norm: str, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 3, k) + 0.5).to(dtype)
    columns = torch.randperm(k)[: max(1, k // 2)].sort().values.int()
    for weight, bias in ((torch.rand(k).to(dtype), torch.randn(k).to(dtype)), (None, None)):
        y = norm_gather(x, columns, weight, bias, eps=1e-5, norm=norm, backend="triton")
        plain = reference.norm_gather(x, columns, weight, bias, 1e-5, norm)
        wide = [None if t is None else t.double() for t in (weight, bias)]
        exact = reference.norm_gather(x.double(), columns, *wide, 1e-5, norm)
        assert_no_worse(y, plain, exact)
    stock = {"rms": F.rms_norm, "layer": F.layer_norm}.get(norm)
    if stock is not None:
        torch.testing.assert_close(plain, stock(x, (k,), eps=1e-5)[..., columns.long()])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_open_mass(distribution: str) -> None:
    config = GateConfig(distribution=distribution)
    gates = [Gate(size, config) for size in (5, 1, 1500, 64)]
    for gate in gates:
        nn.init.normal_(gate.logits)
    shift, scale = {
        "gaussian": (config.offset, config.open_sigma),
        "hard_concrete": (config.beta * math.log(-config.gamma / config.zeta), 1.0),
        "ranking": (0.0, 1.0),
    }[distribution]
    offsets = torch.tensor([0, 5, 6, 1506, 1570])
    grads = []
    for backend in ("triton", "torch"):
        logits = torch.cat([gate.logits for gate in gates]).detach().requires_grad_()
        mass = open_mass(logits, offsets, distribution, shift, scale, backend=backend)
        expected = torch.stack([gate.open_probability().sum() for gate in gates])
        torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-6)
        mass.square().sum().backward()
        grads.append(logits.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    expected.square().sum().backward()
    if distribution != "ranking":
        plain = torch.cat([gate.logits.grad for gate in gates])
        torch.testing.assert_close(grads[0], plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_norm_gather_of_strided_and_empty_operands(norm: str) -> None:
    columns = torch.tensor([0, 3, 64], dtype=torch.int32)
    x = torch.randn(66, 2, 5).permute(2, 1, 0)
    for rows in (x, x[:0], x[..., ::1].expand(3, 5, 2, 66)):
        y = norm_gather(rows, columns, norm=norm, backend="triton")
        plain = reference.norm_gather(rows, columns, None, None, 1e-6, norm)
        torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-6)
    assert norm_gather(x, columns[:0], norm=norm, backend="triton").shape == (5, 2, 0)


def test_pruned_linear_of_strided_operands() -> None:
    rows, columns = (torch.tensor(index, dtype=torch.int32) for index in ([1, 5, 64], [0, 3, 4]))
    x, w = torch.randn(70, 3, 5).permute(1, 2, 0), torch.randn(3, 3).t()
    residual = torch.randn(66, 5, 3).permute(2, 1, 0)
    args = (x, w, torch.randn(6)[::2], rows, columns, 66)
    y = pruned_linear(*args, residual=residual, backend="triton")
    plain = reference.pruned_linear(*args, "none", residual)
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)


def test_open_mass_of_nothing() -> None:
    for offsets, size in (([0], 0), ([0, 0, 3, 3], 3)):
        logits = torch.randn(size, requires_grad=True)
        args = (logits, torch.tensor(offsets), "gaussian", 0.5, 0.5)
        mass = open_mass(*args, backend="triton")
        torch.testing.assert_close(mass, reference.open_mass(*args))
        mass.sum().backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def test_ops_without_a_layer_compile_whole() -> None:
    index = torch.tensor([0, 3, 6], dtype=torch.int32)
    w, offsets = torch.randn(3, 3), torch.tensor([0, 3, 9])

    def run(x: Tensor, logits: Tensor) -> Tensor:
        y = pruned_linear(x, w, None, index, index, 9, activation="gelu")
        mass = open_mass(logits, offsets, "gaussian", 0.5, 0.5)
        return norm_gather(y, index).sum() + mass.sum()

    x, logits = torch.randn(4, 9), torch.randn(9)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, logits), run(x, logits))
    torch.compiler.reset()


def layer_of(
    distribution: str, sizes: tuple[int, int] = (70, 66), margin: float = 0.5, **changes: Any
) -> Any:
    """Return a layer whose logits lie around ``margin`` above the closing one."""
    layer = FusedGatedLinear(*sizes, config=GateConfig(distribution=distribution, **changes))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for gate in (layer.row_gate, layer.column_gate):
            if gate is not None:
                noise = torch.randn(gate.logits.shape, generator=g)
                gate.logits.copy_(noise * 0.7 + gate.config.closing_logit + margin)
    return layer


def step(layer: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(7)
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.square().mean().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("closed_gradient", [True, False])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("frozen", [True, False])
def test_layer_agrees_with_its_cpu_path(
    frozen: bool, distribution: str, closed_gradient: bool, training: bool, calls: Counter[str]
) -> None:
    """Same seed, same samples, same gradients as Gate and the reference give on a CPU."""
    layer = layer_of(distribution, closed_gradient=closed_gradient).train(training)
    layer.weight.requires_grad_(not frozen)
    x = torch.randn(3, 5, 70)
    ours = step(layer, x)
    assert calls["triton"] == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finegates.nn.gated_linear.INTERPRETED", False)
        with use_backend("torch"):
            plain = step(layer, x)
    assert len(ours) == len(plain) == 2 + 3 + (not frozen)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_lora_meets_the_gates_that_the_kernel_samples(
    distribution: str, calls: Counter[str]
) -> None:
    layer = layer_of(distribution, lora_rank=2).train()
    assert layer.lora is not None
    torch.nn.init.normal_(layer.lora.up)
    x = torch.randn(3, 5, 70)
    ours = step(layer, x)
    assert calls["triton"] == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finegates.nn.gated_linear.INTERPRETED", False)
        plain = step(layer, x)
    assert len(ours) == len(plain) == 2 + 6
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sides", ["both", "rows", "columns"])
@pytest.mark.parametrize("closed_gradient", [True, False])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_reordering_changes_no_result(distribution: str, closed_gradient: bool, sides: str) -> None:
    """The same step with closed gates last; a changed weight is used at once."""
    layer = layer_of(
        distribution,
        (150, 160),
        0.0,
        closed_gradient=closed_gradient,
        rows=sides != "columns",
        columns=sides != "rows",
    )
    with pytest.raises(ValueError, match="weight must be frozen"):
        layer.reorder_()
    layer.weight.requires_grad_(False)
    x = torch.randn(3, 5, 150)
    plain = step(layer, x)
    names = list(layer.state_dict())
    layer.reorder_()
    assert layer._operands()[0] is not layer.weight
    assert list(layer.state_dict()) == names
    for a, b in zip(plain, step(layer, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    assert layer._operands()[0] is layer.weight


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_controller_refreshes_the_order(distribution: str) -> None:
    """Training with a new order every other step is training without one."""
    trained, orders = [], []
    for every in (0, 2):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(150, 160), nn.GELU(), nn.Linear(160, 150))
        config = GateConfig(
            distribution=distribution, modules=("*",), sparsity=0.8, warmup=0.2, ramp=0.2,
            reorder_every=every,
        )  # fmt: skip
        gate_(model, config).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        controller = GateController(model, total_steps=6)
        controller.start()
        for i in range(6):
            model(torch.randn(5, 150)).square().mean().backward()
            controller.before_step(i)
            optimizer.step()
            optimizer.zero_grad()
            controller.after_step(i)
            orders.append(model[0]._ordered)
        trained.append(torch.cat([p.detach().flatten() for p in parameters]))
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)
    assert orders[:7] == [None] * 7, "no order was asked for, or nothing is closed yet"
    assert orders[9] is orders[10], "an order holds until the next"
    assert all(orders[11] is not other for other in (None, orders[9]))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("bert", {"hidden_size": 48}), ("llama", {"hidden_size": 64, "head_dim": 16})],
)
def test_what_is_left_of_a_model_is_aligned(
    model_type: str, sizes: dict[str, int], launches: Launches
) -> None:
    """Kept counts are filled up to multiples of 16, and nothing but the rounding changes."""
    model = build(model_type, layers=1, intermediate_size=80, **sizes)
    gate_(model, GateConfig(sparsity=0.5, closed_gradient=False))
    scatter_gates_(model, 0.5)
    batch = inputs()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    with use_backend("torch"):
        masked = gradients()
    gates = GateMap(model)
    shrink_(gates)
    removed = [held for _, held in gates.kept.values() if held.features is not None]
    assert any(held.living is not None for held in removed)
    launches.kernels.clear()
    ours = gradients()
    products = [(name, given) for name, given in launches.kernels if {"N", "K"} <= set(given)]
    for name, given in products:
        assert given["N"] % 16 == given["K"] % 16 == 0, name
    launched = Counter(name for name, _ in products)
    assert launched["gated_matmul_fwd"] == len(gates.layers)
    assert launched["gated_matmul_bwd_x"] == len(gates.layers)
    assert ours.keys() == masked.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, masked[name], rtol=1e-3, atol=1e-5, msg=name)


def test_order_is_kept_where_nothing_would_be_skipped() -> None:
    layer = layer_of("ranking", (150, 160), 9.0)
    layer.weight.requires_grad_(False)
    layer.reorder_()
    assert layer._operands()[0] is layer.weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finegates.nn.gated_linear.INTERPRETED", False)
        closed = layer_of("ranking", (150, 160), -9.0)
        closed.weight.requires_grad_(False)
        closed.reorder_()
        assert closed._operands()[0] is closed.weight, "a CPU skips nothing"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count which backend serves `gated_matmul`, by the table's own entries."""
    calls: Counter[str] = Counter()
    entries = []
    for entry in dispatch.TABLE["gated_matmul"]:

        def run(*args: Any, entry: Any = entry) -> Any:
            calls[entry.backend] += 1
            return entry.run(*args)

        entries.append(dispatch.Implementation(entry.backend, entry.why_not, run, entry.status))
    monkeypatch.setitem(dispatch.TABLE, "gated_matmul", tuple(entries))
    return calls


@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
def test_checkpointing_recomputes_the_same_gates(distribution: str) -> None:
    layer = layer_of(distribution)
    x = torch.randn(5, 70)
    plain = step(layer, x)
    recomputed = step(Checkpointed(layer), x)
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


class Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return y


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_compiles_whole(distribution: str) -> None:
    layer = layer_of(distribution)
    x = torch.randn(5, 70)
    plain = step(layer, x)
    torch.compiler.reset()
    compiled = step(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    torch.compiler.reset()
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast_casts_operands_and_keeps_logits() -> None:
    layer = layer_of("gaussian")
    with torch.autocast("cpu", torch.float16):
        y = layer(torch.randn(5, 70))
    assert y.dtype == torch.float16
    y.float().sum().backward()
    assert layer.row_gate.logits.grad.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("distribution", "compact"), [*((d, False) for d in DISTRIBUTIONS), ("ranking", True)]
)
def test_opcheck(distribution: str, compact: bool) -> None:
    case = make((2, 3), 9, 7, distribution=distribution)
    if compact:
        assert case.row_logits is not None
        case.rows = torch.tensor([0, 4, 8], dtype=torch.int32)
        case.w, case.b = case.w[:3].clone(), None
    for name in ("x", "w", "b", "row_logits", "column_logits"):
        tensor = getattr(case, name)
        if tensor is not None:
            setattr(case, name, tensor.clone().requires_grad_())
    torch.library.opcheck(schema.ops.gated_matmul.default, (*case.call(), "auto"))
    with torch.no_grad():
        y, r, c = schema.ops.gated_matmul.default(*case.call(), "auto")
    args = (torch.randn_like(y), y, r, c, *case.call(), "auto", [True] * 5)
    args = tuple(t.detach() if isinstance(t, Tensor) else t for t in args)
    torch.library.opcheck(schema.ops.gated_matmul_backward.default, args)


def test_opcheck_of_the_small_ops() -> None:
    x, columns = torch.randn(2, 3, 9), torch.tensor([0, 4, 8], dtype=torch.int32)
    torch.library.opcheck(
        schema.ops.norm_gather.default, (x, columns, None, None, 1e-6, "rms", "auto")
    )
    logits = torch.randn(9, requires_grad=True)
    offsets = torch.tensor([0, 4, 9])
    torch.library.opcheck(
        schema.ops.open_mass.default, (logits, offsets, "gaussian", 0.5, 0.5, "auto")
    )
    args = (torch.randn(2), logits.detach(), offsets, "gaussian", 0.5, 0.5, "auto")
    torch.library.opcheck(schema.ops.open_mass_backward.default, args)


def test_only_x_and_y_and_the_gates_are_saved() -> None:
    """Beside the parameters: x, y, 4 (N + K) bytes of gate values and the seed's 16."""
    layer = layer_of("gaussian")
    layer.weight.requires_grad_(False)
    x = torch.randn(33, 70, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    owned = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr(), y.data_ptr()}
    extra = {t.data_ptr(): t.nbytes for t in saved if t.data_ptr() not in owned}
    assert sum(extra.values()) == 4 * (70 + 66) + 16


def test_refusals_have_reasons() -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    for dtype, reason in (
        (torch.bfloat16, "interpreter truncates bfloat16"),
        (torch.float64, "no kernel for torch.float64"),
    ):
        with pytest.raises(ValueError, match=reason):
            gated_linear(x.to(dtype), w.to(dtype), backend="triton")
        with use_backend("auto"):
            gated_linear(x.to(dtype), w.to(dtype))  # falls back
    assert _triton.refusal(x, w.to("meta")) == "operands are on cpu and meta"
    assert _triton.same_dtype(x, w.half()) == "operands are torch.float32 and torch.float16"
    case = make(3, 5, 7)
    constants = (case.config.distribution, case.config.constants)
    args = (case.x, case.w, case.b, case.row_logits, case.column_logits, case.seed, *constants)
    index = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)
    for changes, message in (
        ({"rows": index[:3], "out_features": 5}, "w's rows|must have shape"),
        ({"row_layout": (4, 2)}, "layout of row_logits must tile 5"),
        ({"out_features": 6}, "out_features must fit"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_matmul(*args, **changes)
    for position, value, message in (
        (3, torch.zeros(4), r"row_logits must be fp32 \[5\]"),
        (4, torch.zeros(7, dtype=torch.float64), r"column_logits must be fp32 \[7\]"),
        (5, torch.zeros(1, dtype=torch.int64), r"seed must be int64 \[2\]"),
        (6, "uniform", "distribution must be one of"),
        (2, torch.zeros(4), "b must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_matmul(*args[:position], value, *args[position + 1 :])


def test_pruned_linear_refuses_maps_that_would_write_elsewhere() -> None:
    x, w = torch.randn(2, 3), torch.randn(2, 3)
    for rows in ([0, 5], [-1, 0], [1, 1], [2, 1]):
        with pytest.raises(ValueError, match="rows must be a permutation of 5 features, or some"):
            pruned_linear(x, w, None, torch.tensor(rows, dtype=torch.int32), None, 5)


def test_precision_follows_either_of_torchs_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for allowed in ("tf32", "ieee"):
            matmul.fp32_precision = allowed
            assert _triton.precision(x) == allowed
            assert _triton.precision(x.half()) == "ieee"
        matmul.fp32_precision = before
        torch.set_float32_matmul_precision("high")
        assert _triton.precision(x) == "tf32"
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert _triton.precision(x) == "ieee", "the CDNA table has no tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_sizes_beyond_int32_are_refused_before_launch() -> None:
    """A 2³¹-row x as a stride-0 view: no memory, and no launch."""
    x = torch.zeros(1, 3).expand(2**31, 3)
    reason = _triton_gated.why_not(x, torch.zeros(4, 3), None, None, None)
    assert reason is not None
    assert "a size is above" in reason


@pytest.mark.parametrize("operand", ["x", "w", "dy", "norm_gather's x", "pruned_linear's w"])
def test_columns_that_span_more_than_32_bits_are_refused(operand: str) -> None:
    """The index of a column and its stride are multiplied in 32 bits: strides of no memory."""
    apart = torch.empty(1, device="meta").as_strided((4, 3), (1, 2**30))
    fits = torch.empty(1, device="meta").as_strided((4, 3), (1, launch.MAX_SIZE // 3))
    near = torch.empty(4, 3, device="meta")
    index = torch.empty(2, dtype=torch.int32, device="meta")

    def reason(t: Tensor) -> str | None:
        if operand == "norm_gather's x":
            return _triton.norm_gather_why_not(t, index, None, None)
        if operand == "pruned_linear's w":
            return _triton.pruned_why_not(near, t, None, None, None, 4, "none", None)
        x, w, dy = (t if operand == name else near for name in ("x", "w", "dy"))
        return _triton_gated.backward_why_not(dy, x, w, None)

    refused = reason(apart)
    assert refused is not None
    assert "the last dimension spans more than" in refused
    assert reason(fits) is None


def test_more_outputs_than_int32_counts_are_refused() -> None:
    """A compact weight of few rows may scatter to any number of features."""
    x, w = torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta")
    rows = torch.empty(4, dtype=torch.int32, device="meta")
    reason = _triton.pruned_why_not(x, w, None, rows, None, 2**31, "none", None)
    assert reason == f"a size is above {launch.MAX_SIZE}"
    call = make(1, 1, 1).call()._replace(x=x, w=w, b=None, rows=rows, out_features=2**31)
    assert _triton_gated.fused_why_not(call) == reason


def test_choice_between_fused_and_fold_says_why() -> None:
    def reasons(m: int, n: int, k: int, **changes: Any) -> tuple[str | None, str | None]:
        case = make(1, 1, 1, **changes)
        one = torch.empty(1, 1).half()
        call = case.call()._replace(x=one.expand(m, k), w=one.expand(n, k), b=None)
        return _triton_gated.fused_why_not(call), _triton_gated.fold_why_not(call)

    fused, fold = reasons(16384, 3072, 768)
    assert fold is None
    assert fused is not None
    assert "folding is faster at 16384×3072×768" in fused
    fused, fold = reasons(64, 2048, 8192)
    assert fused is None
    assert fold is not None
    assert "gates in the GEMM are faster at 64×2048×8192" in fold
    fused, fold = reasons(16384, 3072, 768, distribution="ranking", closed_grad=True)
    assert fused is None
    assert fold == "closed gates get a gradient, which a folded weight has lost"
