"""`GateConfig`: ranges, serialisation, derived logits, schedule."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finegates import Gate, GateConfig
from finegates.config import BUDGETS, DISTRIBUTIONS, OBJECTIVES, TIES
from finegates.cost_table import CostTable, LinearCosts

COSTS = CostTable(7, 1, (LinearCosts((2, 4), (3,), ((1e-6,), (2e-6,))),))
POSITIVE = st.floats(1e-6, 1e6)
PATTERNS = st.lists(st.text(max_size=8), max_size=3).map(tuple)


@st.composite
def configs(draw: st.DrawFn) -> GateConfig:
    """Any valid config."""
    warmup = draw(st.floats(0.0, 1.0, exclude_max=True))
    rows = draw(st.booleans())
    distribution = draw(st.sampled_from(DISTRIBUTIONS))
    train_weight = draw(st.booleans())
    return GateConfig(
        distribution=distribution,
        sparsity=draw(st.floats(0.0, 1.0, exclude_min=True, exclude_max=True)),
        budget=draw(st.sampled_from(BUDGETS[: None if distribution == "ranking" else 1])),
        costs=draw(st.sampled_from((None, COSTS))),
        objective=draw(st.sampled_from(OBJECTIVES[: 1 if distribution == "ranking" else None])),
        tie=draw(st.sampled_from(TIES)),
        rows=rows,
        columns=draw(st.booleans()) or not rows,
        modules=draw(st.none() | PATTERNS.filter(bool)),
        train_bias=draw(st.booleans()),
        train_weight=train_weight,
        reorder_every=0 if train_weight else draw(st.integers(0, 1000)),
        trainable=draw(PATTERNS),
        closed_gradient=draw(st.booleans()),
        warmup=warmup,
        ramp=draw(st.floats(0.0, 1.0 - warmup)),
        penalty_weight=draw(st.floats(0.0, 1e6)),
        gate_learning_rate=draw(st.none() | POSITIVE),
        sigma=draw(POSITIVE),
        open_sigma=draw(POSITIVE),
        offset=draw(st.floats(1e-6, 1.0 - 1e-6)),
        beta=draw(POSITIVE),
        gamma=-draw(st.floats(5e-324, 1e300)),
        zeta=draw(st.floats(1.0, 1e300, exclude_min=True)),
        init_mean=draw(st.none() | st.floats(-1e6, 1e6)),
        init_std=draw(st.floats(0.0, 1e6)),
        backend=draw(st.sampled_from(("auto", "torch", "triton"))),
    )


@given(configs())
def test_round_trip_through_json(config: GateConfig) -> None:
    assert GateConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(configs())
def test_every_valid_config_has_finite_edges(config: GateConfig) -> None:
    assert math.isfinite(config.closing_logit)
    assert math.isfinite(config.start_logit)


@given(configs(), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_target_rises_from_zero_to_the_sparsity(config: GateConfig, a: float, b: float) -> None:
    early, late = sorted((a, b))
    assert 0.0 <= config.target(early) <= config.target(late) <= config.sparsity
    assert config.target(1.0) == pytest.approx(config.sparsity, rel=1e-12)
    if config.warmup > 0.0:
        assert config.target(config.warmup) == 0.0


def test_target_by_hand() -> None:
    config = GateConfig(sparsity=0.4, warmup=0.2, ramp=0.5)
    assert config.target(0.1) == 0.0
    assert config.target(0.45) == pytest.approx(0.4 * (1.0 - 0.5**3))
    assert config.target(0.7) == config.target(0.9) == 0.4
    assert GateConfig(warmup=0.0, ramp=0.0).target(0.0) == 0.4


INVALID: list[tuple[str, Any]] = [
    ("distribution", "bernoulli"),
    ("distribution", None),
    ("objective", "l0"),
    ("tie", "units"),
    ("backend", "cuda"),
    ("backend", "native"),
    ("rows", 1),
    ("columns", None),
    ("train_bias", "yes"),
    ("train_weight", 0),
    ("closed_gradient", 1.0),
    ("reorder_every", -1),
    ("reorder_every", 2.0),
    ("reorder_every", True),
    ("budget", "seconds"),
    ("costs", 3),
    ("sparsity", 0.0),
    ("sparsity", 1.0),
    ("sparsity", -0.1),
    ("sparsity", 1),
    ("sparsity", True),
    ("sparsity", "0.4"),
    ("sparsity", math.nan),
    ("sparsity", None),
    ("warmup", 1.0),
    ("warmup", -0.1),
    ("ramp", 0.86),
    ("ramp", -0.1),
    ("recovery", 0.5),
    ("recovery", -0.1),
    ("penalty_weight", -1.0),
    ("penalty_weight", math.inf),
    ("gate_learning_rate", 0.0),
    ("sigma", 0.0),
    ("open_sigma", -0.5),
    ("offset", 0.0),
    ("offset", 1.0),
    ("beta", 0.0),
    ("gamma", 0.0),
    ("zeta", 1.0),
    ("init_std", -0.1),
    ("init_mean", math.nan),
    ("init_mean", "1"),
    ("modules", "query"),
    ("modules", ()),
    ("modules", (1,)),
    ("modules", 3),
    ("trainable", "classifier"),
    ("trainable", None),
]


@pytest.mark.parametrize(("name", "value"), INVALID, ids=[f"{n}={v!r}" for n, v in INVALID])
def test_bad_value_names_field_and_value_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as error:
        GateConfig(**{name: value})
    message = str(error.value)
    assert "\n" not in message
    assert repr(value) in message or value == ()


@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
def test_only_ranking_gates_meet_a_latency(distribution: str) -> None:
    with pytest.raises(
        ValueError, match=f"budget 'latency' needs ranking gates, got '{distribution}'"
    ):
        GateConfig(distribution=distribution, budget="latency")


def test_no_side_gated() -> None:
    with pytest.raises(ValueError, match="rows and columns"):
        GateConfig(rows=False, columns=False)


def test_is_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GateConfig().sparsity = 0.5  # type: ignore[misc]
    assert len({GateConfig(), GateConfig(), GateConfig(sparsity=0.5)}) == 2


def test_lists_from_json_become_tuples() -> None:
    config = GateConfig.from_dict({"modules": ["a", "b"], "trainable": []})
    assert config.modules == ("a", "b")
    assert config.trainable == ()


def test_unknown_keys_are_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match="unknown keys: flavour, zest") as caught:
        config = GateConfig.from_dict({"zest": 1, "sparsity": 0.3, "flavour": 2})
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert config == GateConfig(sparsity=0.3)


def test_known_keys_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GateConfig.from_dict(GateConfig().to_dict())


@pytest.mark.parametrize("version", [2, 0, -1, "1", None, 1.0, True])
def test_unknown_version(version: Any) -> None:
    with pytest.raises(ValueError, match="version"):
        GateConfig.from_dict({"version": version})


@pytest.mark.parametrize("values", [[], [("sparsity", 0.3)], "sparsity", None, 3])
def test_dict_that_is_none(values: Any) -> None:
    with pytest.raises(ValueError, match="mapping"):
        GateConfig.from_dict(values)


def test_paper_constants() -> None:
    """The authors' model.py and finetune_glue.py, commit 4fff8054."""
    config = GateConfig.paper()
    assert config.distribution == "gaussian"
    assert config.objective == "per_axis"
    assert config.tie == "none"
    assert config.penalty_weight == 50.0
    assert config.sparsity == 0.4
    assert config.sigma == 0.1
    assert config.open_sigma == 0.5
    assert config.offset == 0.5
    assert (config.init_mean, config.init_std) == (1.0, 0.1)
    assert config.gate_learning_rate == 1e-3
    assert config.target(0.0) == config.target(1.0) == 0.4
    assert GateConfig.paper(sparsity=0.2) == dataclasses.replace(config, sparsity=0.2)


@pytest.mark.parametrize(
    ("config", "closing", "start"),
    [
        (GateConfig(), 0.0, 1.0),
        (GateConfig(distribution="gaussian"), -0.5493061443340549, 0.5493061443340549),
        (GateConfig(distribution="hard_concrete"), -2.3978952727983707, 2.3978952727983707),
        (GateConfig(distribution="gaussian", offset=0.25, init_mean=3.0), -0.2554128118829953, 3.0),
    ],
    ids=["ranking", "gaussian", "hard-concrete", "offset"],
)
def test_edges_by_hand(config: GateConfig, closing: float, start: float) -> None:
    assert config.closing_logit == pytest.approx(closing, abs=1e-12)
    assert config.start_logit == pytest.approx(start, abs=1e-12)


@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
@pytest.mark.parametrize("offset", [0.1, 0.5, 0.9])
def test_edges_are_where_the_evaluation_value_saturates(distribution: str, offset: float) -> None:
    config = GateConfig(distribution=distribution, offset=offset, gamma=-offset, zeta=1.0 + offset)
    gate = Gate(4, config).eval()
    steps = torch.tensor([-1e-3, 1e-3])
    with torch.no_grad():
        gate.logits[:2] = config.closing_logit + steps
        gate.logits[2:] = config.start_logit + steps
        below_closing, above_closing, below_open, above_open = gate().tolist()
    assert below_closing == 0.0 < above_closing < below_open < 1.0 == above_open


def test_per_axis_objective_needs_probabilities() -> None:
    with pytest.raises(ValueError, match="objective 'per_axis' needs gaussian or hard_concrete"):
        GateConfig(distribution="ranking", objective="per_axis")


def test_an_order_needs_frozen_weights() -> None:
    with pytest.raises(ValueError, match="reorder_every needs train_weight=False, got 50"):
        GateConfig(reorder_every=50, train_weight=True)


def test_learning_rate_of_the_logits_follows_the_distribution() -> None:
    assert GateConfig().logits_learning_rate == 0.1
    assert GateConfig(distribution="gaussian").logits_learning_rate == 0.05
    assert GateConfig(distribution="hard_concrete").logits_learning_rate == 0.2
    assert GateConfig(gate_learning_rate=0.01).logits_learning_rate == 0.01
