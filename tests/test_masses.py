"""Sums of open probabilities over sides, against the resolved probabilities themselves."""

from __future__ import annotations

import pytest
import torch

from finegates import GateConfig, GateMap, gate_
from finegates.surgery import GateController
from finegates.surgery.couplings import Side
from finegates.surgery.masses import layer_masses, own_means
from launches import Launches
from tiny_models import build, scatter_gates_


@pytest.mark.parametrize("model_type", ["bert", "llama"])
@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
@pytest.mark.parametrize("sides", ["both", "rows", "columns"])
def test_layer_masses(model_type: str, distribution: str, sides: str) -> None:
    """Equal to the general path, with its gradients, wherever a gate alone decides each unit."""
    config = GateConfig(distribution=distribution, rows=sides != "columns", columns=sides != "rows")
    model = gate_(build(model_type), config)
    scatter_gates_(model, 0.6)
    gates = GateMap(model)
    masses = layer_masses(gates)
    assert masses is not None
    alive = gates.open_probabilities()
    expected = torch.stack(
        [alive[Side(name, axis)].sum() for name in gates.layers for axis in ("row", "column")]
    )
    got = masses()
    torch.testing.assert_close(got, expected)
    logits = [gate.logits for gate in gates.gates()]
    weights = torch.randn(len(got))
    ours = torch.autograd.grad(got @ weights, logits)
    plain = torch.autograd.grad(expected @ weights, logits)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
@pytest.mark.parametrize("objective", ["fraction", "per_axis"])
def test_penalty_takes_as_many_launches_for_any_number_of_layers(
    model_type: str, objective: str
) -> None:
    counts = []
    for layers in (1, 5):
        model = gate_(
            build(model_type, layers=layers),
            GateConfig(distribution="gaussian", objective=objective),
        )
        controller = GateController(model, total_steps=10)
        for logits in controller.logits:
            logits.grad = torch.zeros_like(logits)
        controller.before_step(0)
        with Launches() as launches:
            controller.before_step(1)
        counts.append(len(launches.names))
    assert counts[0] == counts[1] < 40


def test_independent_gates_need_the_general_path() -> None:
    model = gate_(build("bert"), GateConfig(distribution="gaussian", tie="none"))
    gates = GateMap(model)
    assert layer_masses(gates) is None
    means = own_means(gates)()
    expected = [
        gate.open_probability().mean()
        for side in gates.sides()
        if (gate := gates.gate(side)) is not None
    ]
    torch.testing.assert_close(means, torch.stack(expected))
