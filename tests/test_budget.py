"""`GateMap`: exact counts, and a budget that is met whatever the logits look like."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from finegates import FusedGatedLinear, GateConfig, GateMap, gate_, prune_
from finegates.surgery import Removal, Side
from finegates.surgery.budget import _between
from priced import by_latency, costs_of
from tiny_models import build, scatter_gates_

ALL = ("ranking", "gaussian", "hard_concrete")
TARGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def chain(*sizes: int, **changes: object) -> nn.Sequential:
    """Gated Linears in a row, uncoupled."""
    model = nn.Sequential(*(nn.Linear(k, n) for k, n in zip(sizes, sizes[1:], strict=False)))
    return gate_(model, GateConfig(modules=("*",), **changes))  # type: ignore[arg-type]


def all_logits(model: nn.Module) -> Tensor:
    return torch.cat([gate.logits.detach().clone() for gate in GateMap(model).gates()])


@torch.no_grad()
def randomise_(model: nn.Module, std: float = 1.0, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for gate in GateMap(model).gates():
        gate.logits.copy_(std * torch.randn(gate.logits.shape, generator=generator))


def parameters_left(model: nn.Module) -> int:
    """Elements of the compact weights, counted on the pruned model itself."""
    return sum(m.weight.numel() for m in model.modules() if hasattr(m, "in_features"))


def test_count_by_hand() -> None:
    model = chain(4, 3, 2)
    gates = GateMap(model)
    with torch.no_grad():
        model[0].row_gate.logits.copy_(torch.tensor([1.0, -1.0, 1.0]))
        model[0].column_gate.logits.copy_(torch.tensor([1.0, 1.0, -1.0, 1.0]))
        model[1].row_gate.logits.copy_(torch.tensor([0.0, 1.0]))  # 0 is closed
    assert gates.removal() == Removal(total=12 + 6, removed=(12 - 2 * 3) + (6 - 1 * 3))
    assert gates.removal().fraction == pytest.approx(0.5)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
@pytest.mark.parametrize("tie", ["unit", "none"])
@pytest.mark.parametrize("distribution", ALL)
def test_count_is_what_prune_removes(model_type: str, tie: str, distribution: str) -> None:
    model = build(model_type)
    gate_(model, GateConfig(distribution=distribution, tie=tie))
    scatter_gates_(model, 0.6)
    gates = GateMap(model)
    removal, names = gates.removal(), list(gates.layers)
    assert removal.total == sum(layer.weight.numel() for layer in gates.layers.values())
    prune_(model)
    left = sum(model.get_submodule(name).weight.numel() for name in names)
    assert removal.removed == removal.total - left
    assert removal.removed > 0


@pytest.mark.parametrize("model_type", ["bert", "llama"])
@pytest.mark.parametrize("tie", ["unit", "none"])
@pytest.mark.parametrize("distribution", ALL)
def test_project_meets_every_target(model_type: str, tie: str, distribution: str) -> None:
    """Within 0.5 point: 4 layers of 96 x 96 and 96 x 160 have units of 0.1 point and less."""
    model = build(
        model_type, layers=4, hidden_size=96, intermediate_size=160, num_attention_heads=4,
        **({"head_dim": 24} if model_type == "llama" else {}),
    )  # fmt: skip
    gate_(model, GateConfig(distribution=distribution, tie=tie))
    randomise_(model)
    gates = GateMap(model)
    for target in TARGETS:
        removal = gates.project_(target)
        assert abs(removal.fraction - target) < 0.005
        assert removal == gates.removal()
    # And back: what was closed opens again.
    assert gates.project_(0.1).fraction < 0.11
    assert gates.project_(0.0).removed == 0


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_budget_of_latency_is_met_within_a_fifth_of_a_point(model_type: str) -> None:
    model = build(
        model_type, layers=3, hidden_size=192, intermediate_size=384, num_attention_heads=8,
        **({"head_dim": 24, "num_key_value_heads": 4} if model_type == "llama" else {}),
    )  # fmt: skip
    costs = costs_of(model)
    gate_(model, by_latency(model))
    randomise_(model)
    gates = GateMap(model)
    for target in TARGETS:
        saved = gates.project_(target)
        assert abs(saved.fraction - target) <= 0.002
        assert saved == gates.budgeted()
    assert abs(gates.removal().fraction - TARGETS[-1]) > 0.01  # another budget than parameters
    shapes = {name: tuple(layer.weight.shape) for name, layer in gates.layers.items()}
    prune_(model)
    kept = {name: tuple(model.get_submodule(name).weight.shape) for name in shapes}
    left = sum(costs.seconds(shapes[name], *kept[name]) for name in shapes)
    total = sum(costs.seconds(shape, *shape) for shape in shapes.values())
    assert 1.0 - left / total == pytest.approx(saved.fraction)


def test_budget_of_latency_needs_costs_of_every_shape() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    with pytest.raises(ValueError, match="budget 'latency' needs costs, got None"):
        gate_(model, GateConfig(modules=("*",), budget="latency"))
    with pytest.raises(ValueError, match=r"costs have no Linear of shape \[4, 16\], only"):
        gate_(model, by_latency(nn.Sequential(nn.Linear(8, 16)), modules=("*",)))
    assert all(type(layer) is nn.Linear for layer in model)


def test_project_takes_the_lowest_and_keeps_the_order() -> None:
    model = chain(16, 16)
    randomise_(model)
    before = all_logits(model)
    GateMap(model).project_(0.4)
    after = all_logits(model)
    torch.testing.assert_close(after - before, (after - before)[:1].expand_as(after))
    assert (before[after <= 0].max() < before[after > 0].min()).item()


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.0, 0.95), st.floats(0.0, 0.95))
def test_project_is_monotone(seed: int, a: float, b: float) -> None:
    model = chain(12, 9, 7)
    randomise_(model, seed=seed)
    gates = GateMap(model)
    low, high = sorted((a, b))
    gates.project_(low)
    few = {side: alive.clone() for side, alive in gates.alive().items()}
    fewer = gates.removal().removed
    gates.project_(high)
    assert gates.removal().removed >= fewer
    for side, alive in gates.alive().items():
        assert not (alive & ~few[side]).any(), "a higher target opened a unit"


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.0, 0.95), st.sampled_from(ALL))
def test_project_is_idempotent(seed: int, target: float, distribution: str) -> None:
    model = chain(12, 9, 7, distribution=distribution)
    randomise_(model, seed=seed)
    gates = GateMap(model)
    first = gates.project_(target)
    alive, logits = gates.alive(), all_logits(model)
    assert gates.project_(target) == first
    for side, value in gates.alive().items():
        assert torch.equal(value, alive[side])
    torch.testing.assert_close(all_logits(model), logits, rtol=0, atol=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(-50.0, 50.0), st.floats(0.0, 0.95))
def test_project_does_not_see_a_common_shift(seed: int, shift: float, target: float) -> None:
    models = [chain(12, 9, 7), chain(12, 9, 7)]
    for model in models:
        # Multiples of 1/1024, which a shift by one leaves exact.
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for gate in GateMap(model).gates():
                noise = torch.randn(gate.logits.shape, generator=generator)
                gate.logits.copy_((noise * 1024).round() / 1024)
    with torch.no_grad():
        for gate in GateMap(models[1]).gates():
            gate.logits.add_(round(shift * 1024) / 1024)
    results = [GateMap(model).project_(target) for model in models]
    assert results[0] == results[1]
    for (_, a), (_, b) in zip(*(GateMap(m).alive().items() for m in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("logit", [0.0, 1.0, -3.0, 1e-30])
@pytest.mark.parametrize("target", [0.0, 0.01, 0.4, 0.6, 0.99])
def test_equal_logits_never_collapse(distribution: str, logit: float, target: float) -> None:
    model = chain(12, 9, 7, distribution=distribution)
    with torch.no_grad():
        for gate in GateMap(model).gates():
            gate.logits.fill_(logit)
    assert GateMap(model).project_(target).removed == 0
    assert all_logits(model).isfinite().all()


def test_two_levels_choose_the_nearer() -> None:
    """Half of the rows on one level: closing them removes half, and nothing lies between."""
    for target, removed in ((0.1, 0), (0.24, 0), (0.26, 50), (0.49, 50), (0.7, 50), (0.9, 50)):
        model = chain(10, 10, columns=False)
        with torch.no_grad():
            model[0].row_gate.logits.copy_(torch.arange(10).remainder(2).float())
        assert GateMap(model).project_(target).removed == removed


@pytest.mark.parametrize("gap", [2.0**-23, 2.0**-20, 1e-3])
@pytest.mark.parametrize("level", [1.0, 1000.0, -7.0])
def test_neighbouring_floats_are_told_apart(gap: float, level: float) -> None:
    """Ranks one ulp apart still split: the threshold lies between them in fp32."""
    model = chain(2, 2, columns=False)
    gate = model[0].row_gate
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([level, level * (1 + gap)]))
    assert GateMap(model).project_(0.5).removed == 2


@settings(max_examples=200)
@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_between_neighbours(below: float) -> None:
    lower = torch.tensor(below)
    upper = torch.nextafter(lower, torch.tensor(math.inf))
    t = _between(lower.item(), upper.item())
    assert lower - t <= 0.0 < upper - t
    assert lower - _between(lower.item(), math.inf) <= 0.0
    assert lower - _between(-math.inf, lower.item()) > 0.0


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_tied_logits_count_and_move_once(model_type: str) -> None:
    """With a gate per unit the model's distinct gates shift by the same constant."""
    model = build(model_type)
    gate_(model, GateConfig(tie="unit"))
    gates = GateMap(model)
    identities = [id(gate.logits) for gate in gates.gates()]
    assert len(identities) == len(set(identities))
    named = {id(p) for name, p in model.named_parameters() if name.endswith("logits")}
    assert set(identities) == named
    randomise_(model)
    before = all_logits(model)
    gates.project_(0.4)
    shift = before - all_logits(model)
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-6)


def test_infinite_logits_are_fixed() -> None:
    model = chain(10, 10, columns=False)
    gate = model[0].row_gate
    with torch.no_grad():
        gate.logits.copy_(torch.arange(10.0))
        gate.logits[9] = -math.inf  # closed for good, counts from the start
        gate.logits[0] = math.inf  # open for good
    gates = GateMap(model)
    assert gates.project_(0.0).removed == 10
    assert gates.project_(0.3).removed == 30
    assert gates.project_(0.99).removed == 90
    assert gate.logits[0] == math.inf
    assert gate.logits[9] == -math.inf
    with torch.no_grad():
        gate.logits.fill_(math.inf)
    assert gates.project_(0.5).removed == 0


def test_nan_logits_are_named() -> None:
    model = chain(4, 3)
    with torch.no_grad():
        model[0].column_gate.logits[1] = math.nan
    gates = GateMap(model)
    for ask in (gates.removal, gates.margins, gates.alive, lambda: gates.project_(0.4)):
        with pytest.raises(ValueError, match="0.column_gate.logits holds NaN"):
            ask()
    with pytest.raises(ValueError, match="0.column_gate.logits holds NaN"):
        prune_(model)
    assert isinstance(model[0], FusedGatedLinear), "a refused prune_ must change nothing"


@pytest.mark.parametrize("target", [1.0, -0.1, 1.5, math.nan])
def test_target_out_of_range(target: float) -> None:
    model = chain(4, 3)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got"):
        GateMap(model).project_(target)


def test_model_without_gates() -> None:
    with pytest.raises(ValueError, match="no FusedGatedLinear"):
        GateMap(nn.Sequential(nn.Linear(2, 2)))


def test_ungated_sides_are_always_open() -> None:
    model = chain(4, 3, columns=False)
    gates = GateMap(model)
    with torch.no_grad():
        model[0].row_gate.logits.fill_(-1.0)
    assert gates.alive()[Side("0", "column")].all()
    assert gates.margins()[Side("0", "column")].tolist() == [math.inf] * 4
    assert gates.open_probabilities()[Side("0", "column")].tolist() == [1.0] * 4
    assert gates.removal().removed == 12


@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
@pytest.mark.parametrize("steps", [-2, -1, 0, 1, 2])
def test_count_follows_the_evaluation_value_at_the_edge(distribution: str, steps: int) -> None:
    """Within a rounding of the closing logit the value decides, as in the forward pass."""
    model = chain(2, 64, distribution=distribution, columns=False)
    gate = model[0].row_gate
    edge = torch.full((64,), gate.config.closing_logit)
    for _ in range(abs(steps)):
        edge = torch.nextafter(edge, torch.full_like(edge, math.copysign(math.inf, steps)))
    with torch.no_grad():
        gate.logits.copy_(edge)
    model.eval()
    x = torch.randn(3, 2)
    before = model(x)
    dead = int((gate.value() == 0).sum())
    assert GateMap(model).removal().removed == 2 * dead
    largest = before.abs().max().item()
    torch.testing.assert_close(prune_(model)(x), before, rtol=0, atol=1e-6 * largest)


def test_gradients_reach_every_distinct_gate() -> None:
    model = build("llama", layers=1)
    gate_(model, GateConfig(distribution="hard_concrete", tie="unit", init_mean=0.0))
    gates = GateMap(model)
    sum(p.sum() for p in gates.open_probabilities().values()).backward()  # type: ignore[union-attr]
    for gate in gates.gates():
        assert gate.logits.grad is not None
        assert (gate.logits.grad > 0).all()


def test_open_probabilities_of_a_tied_unit_are_its_own() -> None:
    """A unit with one gate lives with its probability on every side, not with its square."""
    for model_type in ("bert", "llama"):
        model = build(model_type, layers=1)
        gate_(model, GateConfig(distribution="hard_concrete", tie="unit", init_std=2.0))
        gates = GateMap(model)
        probabilities = gates.open_probabilities()
        for coupling in gates.couplings:
            held = [(s, g) for s in coupling.sides if (g := gates.gate(s)) is not None]
            assert held
            side, gate = held[0]
            expected = gate.spread(gate.open_probability()).view(
                coupling.groups, -1, coupling.pairs, coupling.width
            )[:, 0]
            for other in coupling.sides:
                shape = (coupling.groups, -1, coupling.pairs, coupling.width)
                p = probabilities[other].view(shape)
                torch.testing.assert_close(p, expected[:, None].expand_as(p))
