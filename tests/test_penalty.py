"""The stochastic objectives: by hand, by gradient, against the authors' formula and Monte-Carlo."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finegates import GateConfig, GateMap, gate_
from finegates.penalty import fraction_penalty, per_axis_penalty
from finegates.surgery import Side
from tiny_models import alive_by_definition, build, open_gates

ROWS = [torch.tensor([1.0, 0.5]), torch.tensor([0.25, 0.25, 1.0])]
COLUMNS = [torch.tensor([0.5, 0.5, 1.0]), torch.tensor([1.0])]


def test_fraction_by_hand() -> None:
    """Kept 1.5 · 2 + 1.5 · 1 = 4.5 of 2 · 3 + 3 · 1 = 9."""
    assert fraction_penalty(ROWS, COLUMNS, 0.5).item() == 0.0
    assert fraction_penalty(ROWS, COLUMNS, 0.4).item() == pytest.approx(0.1)
    assert fraction_penalty(ROWS, COLUMNS, 0.9).item() == pytest.approx(0.4)


def test_per_axis_by_hand() -> None:
    """Means 0.75, 0.5 (rows) and 2/3, 1 (columns) against 0.6."""
    expected = (0.15 + 0.1 + (2 / 3 - 0.6) + 0.4) / 4
    assert per_axis_penalty(ROWS, COLUMNS, 0.4).item() == pytest.approx(expected)


def test_per_axis_is_the_mean_of_the_authors_layer_losses() -> None:
    """``SparseLayer.sparsity_loss`` of model.py, commit 4fff8054, written out."""

    def theirs(row_logits: Tensor, column_logits: Tensor, target: float) -> Tensor:
        means = torch.stack(
            [
                (0.5 - 0.5 * torch.erf((-0.5 - torch.tanh(t)) / (0.5 * 2.0**0.5))).mean()
                for t in (row_logits, column_logits)
            ]
        )
        return (means - (1.0 - target)).abs().mean()

    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 7))
    gate_(model, GateConfig.paper(modules=("*",)))
    layers = list(GateMap(model).layers.values())
    rows = [layer.row_gate.open_probability() for layer in layers]  # type: ignore[union-attr]
    columns = [layer.column_gate.open_probability() for layer in layers]  # type: ignore[union-attr]
    losses = [
        theirs(layer.row_gate.logits, layer.column_gate.logits, 0.4)  # type: ignore[union-attr]
        for layer in layers
    ]
    ours = per_axis_penalty(rows, columns, 0.4)
    torch.testing.assert_close(ours, torch.stack(losses).mean(), rtol=1e-6, atol=0)
    assert ours > 0.1


@pytest.mark.parametrize("penalty", [fraction_penalty, per_axis_penalty])
@pytest.mark.parametrize("target", [0.1, 0.9])
def test_gradients(penalty, target: float) -> None:
    vectors = [torch.rand(n, dtype=torch.float64, requires_grad=True) for n in (4, 3, 5, 2)]
    assert torch.autograd.gradcheck(
        lambda a, b, c, d: penalty([a, b], [c, d], target), vectors, atol=1e-8
    )


@pytest.mark.parametrize("penalty", [fraction_penalty, per_axis_penalty])
def test_gradient_step_moves_towards_the_target(penalty) -> None:
    p = torch.full((50,), 0.9, requires_grad=True)
    before = penalty([p], [p], 0.5)
    before.backward()
    assert p.grad is not None
    assert penalty([p - p.grad], [p - p.grad], 0.5) < before


def test_layer_without_both_sides_is_refused() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        fraction_penalty(ROWS, COLUMNS[:1], 0.5)


def removed_in_one_draw(model: PreTrainedModel, gates: GateMap) -> int:
    """Parameters that one sample of every gate closes, one sample for gates that are tied."""
    samples: dict[int, Tensor] = {}
    is_open = open_gates(gates)
    for side in is_open:
        gate = gates.gate(side)
        if gate is not None:
            is_open[side] = samples.setdefault(id(gate.logits), gate().detach()) > 0
    alive = alive_by_definition(model, is_open)
    return sum(
        layer.weight.numel()
        - int(alive[Side(name, "row")].sum()) * int(alive[Side(name, "column")].sum())
        for name, layer in gates.layers.items()
    )


@pytest.mark.parametrize("tie", ["unit", "none"])
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("modules", [None, ("*up_proj", "*down_proj", "*key", "*q_proj", "*dense")])
def test_expected_fraction_is_the_mean_over_samples(
    tie: str, family: str, modules: tuple[str, ...] | None
) -> None:
    """The objective's expectation, couplings and ties included, against drawn gates."""
    model = build(family, layers=1)
    if modules is not None:
        names = [name for name, m in model.named_modules() if type(m) is nn.Linear]
        modules = tuple(m for m in modules if any(n.endswith(m[1:]) for n in names))
    config = GateConfig(
        distribution="hard_concrete", tie=tie, modules=modules, init_mean=-1.0, init_std=1.0
    )
    gates = GateMap(gate_(model, config).train())
    draws = torch.tensor(
        [removed_in_one_draw(model, gates) for _ in range(150)], dtype=torch.float64
    )
    total = gates.removal().total
    probabilities = gates.open_probabilities()
    rows = [probabilities[Side(name, "row")] for name in gates.layers]
    columns = [probabilities[Side(name, "column")] for name in gates.layers]
    expected = fraction_penalty(rows, columns, 0.0).item()
    mean, error = draws.mean() / total, draws.std() / total / len(draws) ** 0.5
    assert abs(mean - expected) < 4.0 * error
    assert 0.2 < expected < 0.98
