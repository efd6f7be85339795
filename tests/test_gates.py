"""`Gate`: samples and their distribution, evaluation values, open probability, layout, casts."""

from __future__ import annotations

import copy
import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from finegates import Gate, GateConfig

DRAWS = 200_000
STOCHASTIC = ("gaussian", "hard_concrete")
ALL = ("ranking", *STOCHASTIC)
# A Kolmogorov-Smirnov test at this level fails one right implementation in a thousand; the seed is
# fixed, so that it fails always or never.
LEVEL = 1e-3


def gate_at(logit: float, size: int = DRAWS, **changes: object) -> Gate:
    """A gate whose logits are all ``logit``."""
    gate = Gate(size, GateConfig(**changes))  # type: ignore[arg-type]
    torch.nn.init.constant_(gate.logits, logit)
    return gate


def interior(z: Tensor) -> Tensor:
    return z[(z > 0) & (z < 1)].detach()


@pytest.mark.parametrize("logit", [-0.7, 0.0, 0.4])
def test_gaussian_sample_is_a_clamped_normal(logit: float) -> None:
    sigma = 0.3
    z = gate_at(logit, distribution="gaussian", sigma=sigma)().detach()
    mean = math.tanh(logit) + 0.5
    law = scipy.stats.norm(mean, sigma)
    for edge, expected in ((0.0, law.cdf(0.0)), (1.0, law.sf(1.0))):
        count = int((z == edge).sum())
        assert scipy.stats.binomtest(count, DRAWS, expected).pvalue > LEVEL
    inside = scipy.stats.truncnorm(-mean / sigma, (1.0 - mean) / sigma, mean, sigma)
    assert scipy.stats.kstest(interior(z).numpy(), inside.cdf).pvalue > LEVEL


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
@pytest.mark.parametrize("beta", [2 / 3, 1.5])
def test_hard_concrete_sample_is_a_stretched_concrete(logit: float, beta: float) -> None:
    config = GateConfig(distribution="hard_concrete", beta=beta)
    z = gate_at(logit, distribution="hard_concrete", beta=beta)().detach()

    def below(value: object) -> object:
        """P(z <= value) inside (0, 1), from the definition."""
        s = (value - config.gamma) / (config.zeta - config.gamma)  # type: ignore[operator]
        return scipy.stats.logistic.cdf(beta * scipy.special.logit(s) - logit)

    for edge, expected in ((0.0, below(0.0)), (1.0, 1.0 - below(1.0))):  # type: ignore[operator]
        count = int((z == edge).sum())
        assert scipy.stats.binomtest(count, DRAWS, float(expected)).pvalue > LEVEL
    low, high = below(0.0), below(1.0)
    inside = interior(z).numpy()
    cdf = lambda v: (below(v) - low) / (high - low)  # type: ignore[operator]  # noqa: E731
    assert scipy.stats.kstest(inside, cdf).pvalue > LEVEL


@pytest.mark.parametrize(
    ("logit", "changes"),
    [
        (-0.6, {"distribution": "gaussian", "sigma": 0.2, "open_sigma": 0.2}),
        (-0.5, {"distribution": "gaussian", "sigma": 0.5, "open_sigma": 0.5}),
        (-3.0, {"distribution": "hard_concrete"}),
        (0.5, {"distribution": "hard_concrete", "beta": 1.0, "gamma": -0.3}),
    ],
    ids=["gaussian-0.2", "gaussian-0.5", "hard-concrete", "hard-concrete-wide"],
)
def test_open_probability_is_the_frequency_of_open(logit: float, changes: dict) -> None:
    gate = gate_at(logit, **changes)
    p = gate.open_probability()[0].item()
    assert 0.02 < p < 0.98
    assert scipy.stats.binomtest(int((gate() > 0).sum()), DRAWS, p).pvalue > LEVEL


def test_gaussian_open_probability_uses_its_own_sigma() -> None:
    """With the authors' σ₀ = 0.5 beside σ = 0.1 the penalty's p is no frequency: their choice."""
    gate = gate_at(-0.6, 1, distribution="gaussian")
    expected = scipy.stats.norm.cdf((math.tanh(-0.6) + 0.5) / 0.5)
    assert gate.open_probability().item() == pytest.approx(expected, rel=1e-6)


def test_ranking_open_probability_is_the_value() -> None:
    gate = Gate(2, GateConfig())
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([-1.0, 1.0]))
    assert gate.open_probability().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("distribution", STOCHASTIC)
def test_one_gate_draws_independent_elements(distribution: str) -> None:
    z = gate_at(0.0, distribution=distribution, sigma=0.3)().detach()
    half = DRAWS // 2
    for a, b in ((z[:half], z[half:]), (z[:-1], z[1:])):
        assert abs(scipy.stats.pearsonr(a.numpy(), b.numpy()).statistic) < 4.0 / half**0.5


@pytest.mark.parametrize("distribution", STOCHASTIC)
def test_manual_seed_reproduces_samples(distribution: str) -> None:
    gate = gate_at(0.0, 64, distribution=distribution)
    torch.manual_seed(7)
    first, second = gate(), gate()
    torch.manual_seed(7)
    assert torch.equal(gate(), first)
    assert torch.equal(gate(), second)
    assert not torch.equal(first, second)


def test_two_gates_draw_different_samples() -> None:
    a, b = (gate_at(0.0, 64, distribution="gaussian") for _ in range(2))
    assert not torch.equal(a(), b())


def test_ranking_draws_nothing() -> None:
    gate = Gate(4, GateConfig())
    state = torch.random.get_rng_state()
    gate()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("distribution", ALL)
def test_evaluation_draws_nothing_and_is_the_value(distribution: str) -> None:
    gate = gate_at(0.1, 8, distribution=distribution).eval()
    state = torch.random.get_rng_state()
    assert torch.equal(gate(), gate.value())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(gate.train().value(), gate.eval().value())


def test_evaluation_values_by_hand() -> None:
    logits = torch.tensor([-3.0, -0.2, 0.0, 0.3, 4.0])
    for distribution, expected in (
        ("ranking", (logits > 0).float()),
        ("gaussian", (logits.tanh() + 0.5).clamp(0, 1)),
        ("hard_concrete", (logits.sigmoid() * 1.2 - 0.1).clamp(0, 1)),
    ):
        gate = Gate(5, GateConfig(distribution=distribution)).eval()
        with torch.no_grad():
            gate.logits.copy_(logits)
        torch.testing.assert_close(gate(), expected)


@pytest.mark.parametrize("closed_gradient", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_ranking_gradient_is_straight_through(closed_gradient: bool, training: bool) -> None:
    gate = Gate(3, GateConfig(closed_gradient=closed_gradient)).train(training)
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    weight = torch.tensor([3.0, 5.0, 7.0])
    (gate() * weight).sum().backward()
    closed = 1.0 if closed_gradient else 0.0
    assert gate.logits.grad is not None
    assert gate.logits.grad.tolist() == [3.0 * closed, 5.0 * closed, 7.0]


def test_clamped_samples_get_no_gradient() -> None:
    gate = gate_at(0.0, 1000, distribution="gaussian", sigma=1.0)
    z = gate()
    z.sum().backward()
    assert gate.logits.grad is not None
    inside = (z > 0) & (z < 1)
    assert 0 < int(inside.sum()) < 1000
    assert torch.equal(gate.logits.grad != 0, inside)


@pytest.mark.parametrize("distribution", ALL)
def test_infinite_logits_are_just_open_and_closed(distribution: str) -> None:
    gate = Gate(2, GateConfig(distribution=distribution))
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([-math.inf, math.inf]))
    assert gate().tolist() == [0.0, 1.0]
    assert gate.eval()().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("distribution", ALL)
def test_nan_logit_is_not_hidden(distribution: str) -> None:
    gate = gate_at(math.nan, 2, distribution=distribution)
    assert gate().isnan().all()
    assert gate.eval()().isnan().all()


def test_start_logits_are_drawn_around_the_mean() -> None:
    gate = Gate(DRAWS, GateConfig.paper())
    assert scipy.stats.kstest(gate.logits.detach(), "norm", (1.0, 0.1)).pvalue > LEVEL
    assert (Gate(3, GateConfig(init_mean=-2.0)).logits == -2.0).all()


def test_opening_edge_leaves_samples_interior() -> None:
    for distribution, share in (
        ("gaussian", 0.5),
        # P(z < 1) - P(z <= 0) at θ = log 11: logistic(-θ / 3) - logistic(-5 θ / 3).
        ("hard_concrete", scipy.special.expit(-math.log(11) / 3) - 1 / (1 + 11 ** (5 / 3))),
    ):
        z = Gate(DRAWS, GateConfig(distribution=distribution))()
        assert scipy.stats.binomtest(len(interior(z)), DRAWS, share).pvalue > LEVEL


def test_layout_spreads_units_over_repeats_and_pairs() -> None:
    groups, repeats, pairs, width = layout = (2, 3, 2, 5)
    gate = Gate(math.prod(layout), GateConfig(distribution="gaussian"), layout)
    assert gate.logits.shape == (groups * width,)
    units = torch.arange(10.0)
    side = gate.spread(units)
    for index, value in enumerate(side.tolist()):
        group, rest = divmod(index, repeats * pairs * width)
        assert value == group * width + rest % width
    sample = gate().view(layout)
    assert torch.equal(sample, sample[:, :1, :1].expand(layout))


def test_layout_must_fit() -> None:
    with pytest.raises(ValueError, match="product 7, got"):
        Gate(7, GateConfig(), (2, 1, 1, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_keep_every_bit_of_the_logits(dtype: torch.dtype) -> None:
    gate = Gate(64, GateConfig(init_std=1.0))
    before = gate.logits.detach().clone()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), gate).to(dtype)
    assert model[0].weight.dtype == dtype
    assert gate.logits.dtype == torch.float32
    assert torch.equal(gate.logits, before)
    assert gate.half().double().bfloat16().logits.dtype == torch.float32
    assert torch.equal(gate.logits, before)


def test_cast_keeps_the_gradient_too() -> None:
    gate = Gate(3, GateConfig())
    gate().sum().backward()
    gate.to(torch.bfloat16)
    assert gate.logits.grad is not None
    assert gate.logits.grad.dtype == torch.float32


def test_moves_follow_the_device() -> None:
    gate = Gate(3, GateConfig()).to("meta", torch.bfloat16)
    assert gate.logits.device.type == "meta"
    assert gate.logits.dtype == torch.float32
    empty = gate.to_empty(device="cpu")
    empty.reset_parameters()
    assert empty().tolist() == [1.0] * 3
    shared = Gate(3, GateConfig()).share_memory()
    assert shared.logits.is_shared()


def test_default_dtype_does_not_reach_the_logits() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert Gate(2, GateConfig()).logits.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_train_and_eval_chain_and_deepcopy_is_independent() -> None:
    gate = Gate(3, GateConfig())
    assert gate.train() is gate
    assert gate.eval() is gate
    twin = copy.deepcopy(gate)
    with torch.no_grad():
        twin.logits.fill_(-1.0)
    assert gate().tolist() == [1.0] * 3
    assert twin.config == gate.config


def test_repr_names_size_and_distribution() -> None:
    assert repr(Gate(3, GateConfig())) == "Gate(3, distribution='ranking')"
