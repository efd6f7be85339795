"""The gated layer on the Triton backend, in the interpreter: steps, order, compilation, memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finegates import FusedGatedLinear, GateConfig, GateMap, gate_, use_backend
from finegates.ops import (
    dispatch,
)
from finegates.surgery import GateController
from finegates.surgery.shrink import shrink_
from launches import Launches
from tiny_models import build, inputs, scatter_gates_

DISTRIBUTIONS = ["gaussian", "hard_concrete", "ranking"]


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
