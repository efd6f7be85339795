"""The schedule around every optimizer step: importance, exact budget, penalty."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from finegates import GateConfig, gate_
from finegates.penalty import fraction_penalty, per_axis_penalty
from finegates.surgery import GateController, GateMap, Side
from finegates.surgery.watch import GateWatch
from priced import costs_of
from tiny_models import build, inputs

STEPS = 20


def gated(**changes: object) -> nn.Module:
    return gate_(build("bert"), GateConfig(**changes))  # type: ignore[arg-type]


def train(
    model: nn.Module, steps: range, controller: GateController, learning_rate: float = 1e-2
) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    model.train()
    for step in steps:
        torch.manual_seed(step)
        model(**inputs(seed=step)).logits.square().mean().backward()
        controller.before_step(step)
        optimizer.step()
        optimizer.zero_grad()
        controller.after_step(step)


def test_warmup_keeps_gates_open_and_sums_squared_gradients() -> None:
    model = gated(warmup=0.5, ramp=0.5)
    controller = GateController(model, STEPS)
    controller.start()
    squares = [torch.full_like(logits, 1e-30) for logits in controller.logits]
    for step in range(3):
        model(**inputs(seed=step)).logits.square().mean().backward()
        for total, logits in zip(squares, controller.logits, strict=True):
            total += logits.grad.square()
        controller.before_step(step)
        assert all(logits.grad is None for logits in controller.logits)
        controller.after_step(step)
        model.zero_grad()
    assert controller.map.removal().removed == 0
    for total, logits in zip(squares, controller.logits, strict=True):
        torch.testing.assert_close(logits.detach(), total)


def test_ranking_starts_from_log_root_mean_square() -> None:
    model = gated(warmup=0.1, ramp=0.5, sparsity=0.3)
    controller = GateController(model, STEPS)
    controller.start()
    train(model, range(1), controller)
    sums = [logits.detach().clone() for logits in controller.logits]
    train(model, range(1, 2), controller)
    assert controller.config.target(2 / STEPS) == 0.0
    after = torch.cat([logits.detach() for logits in controller.logits])
    assert torch.isfinite(after).all()
    assert all((s > 0).all() for s in sums)
    # The ranking is the importance's: a common shift is all that was added.
    torch.manual_seed(0)
    twin = gated(warmup=0.1, ramp=0.5, sparsity=0.3)
    again = GateController(twin, STEPS)
    again.start()
    train(twin, range(1), again)
    torch.manual_seed(1)
    twin.train()
    twin(**inputs(seed=1)).logits.square().mean().backward()
    expected = torch.cat(
        [0.5 * torch.log((logits.detach() + logits.grad.square()) / 2) for logits in again.logits]
    )
    shift = after - expected
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.1, 0.4, 0.6])
@pytest.mark.parametrize("latency", [False, True], ids=["parameters", "latency"])
def test_budget_is_met_at_every_step_and_at_the_end(sparsity: float, latency: bool) -> None:
    model = gated(
        warmup=0.1, ramp=0.5, sparsity=sparsity,
        **({"budget": "latency", "costs": costs_of(build("bert"))} if latency else {}),
    )  # fmt: skip
    controller = GateController(model, STEPS)
    controller.start()
    # One unit of these tiny layers is at most 24 · 3 of 7296 weights: a point, so a point's half.
    unit = max(layer.weight.shape[0] * 3 for layer in controller.map.layers.values())
    tolerance = unit / controller.map.removal().total
    for step in range(STEPS):
        train(model, range(step, step + 1), controller)
        removed = controller.map.budgeted().fraction
        assert removed == pytest.approx(controller.config.target((step + 1) / STEPS), abs=tolerance)
    assert controller.finish().fraction == pytest.approx(sparsity, abs=tolerance)


def test_ranking_needs_one_step_of_importance_even_without_warmup() -> None:
    model = gated(warmup=0.0, ramp=0.0, sparsity=0.4)
    controller = GateController(model, STEPS)
    controller.start()
    train(model, range(2), controller)
    assert controller.map.removal().fraction == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("distribution", ["ranking", "gaussian", "hard_concrete"])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.6])
def test_end_of_training_leaves_nothing_to_harden(distribution: str, sparsity: float) -> None:
    """The target is met within half a point before `finish`, which then changes no output."""
    model = gate_(
        build("bert", hidden_size=48, intermediate_size=96),
        GateConfig(distribution=distribution, sparsity=sparsity),
    )
    controller = GateController(model, 30)
    controller.start()
    train(model, range(30), controller, learning_rate=controller.config.logits_learning_rate)
    before = tiny_models.logits(model.eval())
    assert controller.map.removal().fraction == pytest.approx(sparsity, abs=0.005)
    assert controller.finish().fraction == pytest.approx(sparsity, abs=0.005)
    torch.testing.assert_close(tiny_models.logits(model), before)


def test_overflowed_gradients_are_no_importance() -> None:
    model = gated(warmup=0.5)
    controller = GateController(model, STEPS)
    controller.start()
    model(**inputs()).logits.square().mean().backward()
    for parameter in controller.logits:
        parameter.grad[0], parameter.grad[1] = float("inf"), float("nan")
    controller.before_step(0)
    for parameter in controller.logits:
        assert torch.isfinite(parameter).all()
        assert parameter[0] == parameter[1] == 1e-30


def test_penalty_gradient_is_added_to_the_task_gradient() -> None:
    model = gated(distribution="gaussian", penalty_weight=7.0, warmup=0.0, ramp=0.0)
    controller = GateController(model, STEPS)
    model.train()
    model(**inputs()).logits.square().mean().backward()
    task = [logits.grad.clone() for logits in controller.logits]
    expected = torch.autograd.grad(7.0 * controller.penalty(0.4), controller.logits)
    controller.before_step(0)
    for before, added, logits in zip(task, expected, controller.logits, strict=True):
        assert added.abs().sum() > 0
        torch.testing.assert_close(logits.grad, before + added)


def test_objectives_see_what_they_should() -> None:
    """The fraction objective counts couplings, the authors' counts sides."""
    model = gate_(build("bert"), GateConfig(distribution="gaussian", tie="none", init_mean=0.2))
    controller = GateController(model, STEPS)
    alive = controller.map.open_probabilities()
    names = list(controller.map.layers)
    rows = [alive[Side(name, "row")] for name in names]
    columns = [alive[Side(name, "column")] for name in names]
    torch.testing.assert_close(controller.penalty(0.4), fraction_penalty(rows, columns, 0.4))

    paper = gate_(build("bert"), GateConfig.paper())
    controller = GateController(paper, STEPS)
    layers = controller.map.layers.values()
    own_rows = [layer.row_gate.open_probability() for layer in layers]
    own_columns = [layer.column_gate.open_probability() for layer in layers]
    torch.testing.assert_close(
        controller.penalty(0.4), per_axis_penalty(own_rows, own_columns, 0.4)
    )
    removed = controller.finish()
    assert removed == GateMap(paper).removal()
    assert removed.removed == 0


@pytest.mark.parametrize("total_steps", [0, -3])
def test_total_steps_must_be_positive(total_steps: int) -> None:
    with pytest.raises(ValueError, match=f"total_steps must be at least 1, got {total_steps}"):
        GateController(gated(), total_steps)


@pytest.mark.parametrize("distribution", ["ranking", "gaussian", "hard_concrete"])
def test_recovery_trains_everything_but_the_gates(distribution: str) -> None:
    """The last half of the steps: budget met, logits still, no noise, biases still moving."""
    steps = 12
    config = GateConfig(
        distribution=distribution, sparsity=0.4, warmup=0.25, ramp=0.25, recovery=0.5,
        modules=("*",), train_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = gate_(nn.Sequential(nn.Linear(24, 30), nn.Tanh(), nn.Linear(30, 20)), config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    controller = GateController(model, steps)
    controller.start()
    x = torch.randn(32, 24)
    for step in range(steps):
        controller.begin_step(step)
        if step == 6:
            kept = [logits.detach().clone() for logits in controller.logits]
            bias = model[0].bias.detach().clone()
            fraction = controller.map.removal().fraction
            assert fraction == pytest.approx(0.4, abs=0.05)
        if step >= 6:
            assert torch.equal(model(x), model(x))
            training = model(x)
            assert torch.equal(model.eval()(x), training)
            model.train()
        model(x).square().mean().backward()
        controller.before_step(step)
        optimizer.step()
        optimizer.zero_grad()
        controller.after_step(step)
    assert controller.finish().fraction == fraction
    assert all(torch.equal(a, b) for a, b in zip(controller.logits, kept, strict=True))
    assert not torch.equal(model[0].bias, bias)
    assert controller.hardened == 0.0
    noisy = distribution != "ranking"
    assert torch.equal(model(x), model(x)) is not noisy, "noise is back once training is over"


def test_watch_counts_gates() -> None:
    config = GateConfig(distribution="gaussian", modules=("*",), rows=False, open_sigma=0.5)
    model = gate_(nn.Sequential(nn.Linear(4, 3)), config).eval()
    gate = model[0].column_gate
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([-2.0, 0.0, 0.1, 2.0]))
    watch = GateWatch(GateMap(model))
    assert watch.figures() == {"removed": 0.25, "gates_fractional": 0.5}
    model(torch.randn(5, 4)).square().sum().backward()
    watch.see_gradients()
    with torch.no_grad():
        gate.logits[1] = -2.0
    assert watch.figures() == {
        "removed": 0.5, "gates_fractional": 0.25, "gates_with_gradient": 0.5,
        "gates_changed_side": 0.25,
    }  # fmt: skip
