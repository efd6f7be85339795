"""Samples drawn by the kernels: their distribution, their independence, their reproducibility."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from scipy import stats
from torch import Tensor

from finegates import FusedGatedLinear, GateConfig
from finegates.kernels.gate import gate_tile
from finegates.ops import _triton_gated, reference
from gated_case import FOLD, FUSED, PRETRAINING, make

DRAWS = 1_000_000
# A seed is fixed, so that a test either always passes or never: 1e-3 is an honest level.
LEVEL = 1e-3


@triton.jit
def _sample_kernel(
    out_ptr, logits_ptr, seed_ptr, size, shift, scale, beta,
    DISTRIBUTION: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The kernels' own device function, in blocks that the interpreter gets through quickly."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = gate_tile(
        out_ptr, logits_ptr, seed_ptr, index, index < size, size, size, shift, scale, beta,
        DISTRIBUTION, SIDE,
    )  # fmt: skip
    tl.store(out_ptr + index, z, mask=index < size)


def gates_of(size: int, distribution: str, logit: float, seed: list[int], side: int = 1) -> Tensor:
    """Sample ``size`` row (side 0) or column (1) gates of one logit."""
    constants = GateConfig(distribution=distribution).constants
    c = torch.full((size,), float("nan"))
    logits = torch.full((size,), logit)
    _sample_kernel[(triton.cdiv(size, 65536),)](
        c, logits, torch.tensor(seed), size, *constants,
        DISTRIBUTION=distribution, SIDE=side, BLOCK=65536,
    )  # fmt: skip
    return c


def cdf(distribution: str, logit: float) -> Any:
    """The continuous distribution between the clamps, as a function of z in (0, 1)."""
    config = GateConfig(distribution=distribution)
    if distribution == "gaussian":
        return lambda z: stats.norm.cdf((z - math.tanh(logit) - config.offset) / config.sigma)

    def hard_concrete(z: Any) -> Any:
        s = (np.asarray(z) - config.gamma) / (config.zeta - config.gamma)
        return 1.0 / (1.0 + np.exp(-(config.beta * np.log(s / (1.0 - s)) - logit)))

    return hard_concrete


@pytest.mark.parametrize(
    ("distribution", "logit"),
    [("gaussian", -0.55), ("gaussian", 0.0), ("hard_concrete", -2.0), ("hard_concrete", 0.5)],
)
def test_kolmogorov_smirnov(distribution: str, logit: float) -> None:
    """1e6 draws against the stated law: the two clamped masses, then the interior."""
    z = gates_of(DRAWS, distribution, logit, [0, 12345]).double().numpy()
    law = cdf(distribution, logit)
    closed, fully = float(law(1e-12)), 1.0 - float(law(1.0 - 1e-12))
    for mass, expected in (((z == 0).mean(), closed), ((z == 1).mean(), fully)):
        deviation = math.sqrt(max(expected * (1.0 - expected), 1e-12) / DRAWS)
        assert abs(mass - expected) < 4.0 * deviation + 1e-6
    inside = z[(z > 0) & (z < 1)]
    conditional = stats.kstest(inside, lambda v: (law(v) - closed) / (1.0 - closed - fully))
    assert conditional.pvalue > LEVEL


def test_samples_are_those_of_the_reference() -> None:
    for distribution in ("gaussian", "hard_concrete"):
        config = GateConfig(distribution=distribution)
        z = gates_of(10_000, distribution, 0.0, [3, 2**31 + 7])
        expected = reference.gate(
            torch.zeros(10_000), torch.tensor([2**31 + 7]), [10_000, 10_000], 10_000, distribution,
            *config.constants,
        )  # fmt: skip
        torch.testing.assert_close(z, expected, atol=2e-6, rtol=0)


LOGITS = {"gaussian": -0.5, "hard_concrete": -1.0}


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    """Of n independent pairs the correlation is within 4 / √n of 0 but for 6e-5 of the seeds."""
    correlation = torch.corrcoef(torch.stack((a, b)).double())[0, 1]
    assert abs(correlation.item()) < 4.0 / math.sqrt(len(a))


@pytest.mark.parametrize("distribution", LOGITS)
def test_rows_columns_layers_and_steps_are_independent(distribution: str) -> None:
    """Each side under three seeds, one side against the other, neighbours within a vector."""
    n, logit = 100_000, LOGITS[distribution]
    samples = [
        gates_of(n, distribution, logit, seeds, side)
        for seeds in ([1, 5], [2, 6], [2**31 - 2, 7])
        for side in (0, 1)
    ]
    for i, sample in enumerate(samples):
        assert_uncorrelated(sample[:-1], sample[1:])
        for other in samples[:i]:
            assert_uncorrelated(sample, other)


@pytest.mark.parametrize("distribution", LOGITS)
def test_the_two_sides_of_a_forward_are_independent(distribution: str) -> None:
    """Of one seed tensor as the layer draws it: unit by unit, and each side varies."""
    n = 4096
    case = make(1, n, n, distribution=distribution, bias=False)
    case.row_logits, case.column_logits = (torch.full((n,), LOGITS[distribution]) for _ in "rc")
    _, r, c = _triton_gated.gated_matmul_fused(case.call())
    assert r.std() > 0.05
    assert c.std() > 0.05
    assert_uncorrelated(r, c)


def test_row_and_column_gates_of_a_layer_differ_and_every_step_draws_anew() -> None:
    layer = FusedGatedLinear(512, 512, bias=False, config=GateConfig(distribution="gaussian"))
    assert layer.row_gate is not None
    assert layer.column_gate is not None
    with torch.no_grad():
        layer.weight.copy_(torch.eye(512))
        layer.row_gate.logits.zero_()
        layer.column_gate.logits.zero_()
    x = torch.ones(1, 512)
    first, second = layer(x), layer(x)  # r ⊙ c on the diagonal
    assert (first != second).float().mean() > 0.9
    torch.manual_seed(11)
    third = layer(x)
    torch.manual_seed(11)
    assert torch.equal(layer(x), third)


@pytest.mark.parametrize("forward", [FUSED, FOLD], ids=["fused", "fold"])
@pytest.mark.parametrize("distribution", LOGITS)
def test_every_kernel_uses_the_gates_that_were_drawn(distribution: str, forward: Any) -> None:
    """Both forwards draw the same bits, a recomputation too, and every backward multiplies by them.

    With one token, w = 1, x = 1 and dy one-hot the gradients are r c: dx of the row, dw of it.
    """
    n, k = 130, 600
    case = make(1, n, k, distribution=distribution, bias=False)
    case.x, case.w = torch.ones(1, k), torch.ones(n, k)
    _, r, c = forward[0](case.call())
    for run, _ in (FUSED, FOLD):
        _, again_r, again_c = run(case.call())
        assert torch.equal(r, again_r)
        assert torch.equal(c, again_c)
    assert r.std() > 0.05
    assert c.std() > 0.05
    at = int(r.argmax())
    dy = torch.zeros(1, n).index_fill(1, torch.tensor(at), 1.0)
    y = forward[0](case.call())[0]
    for _, backward in (FUSED, FOLD):
        dx, dw, *_ = backward(case.call(), dy, y, r, c, PRETRAINING)
        assert torch.equal(dx[0], r[at] * c)
        assert torch.equal(dw[at], r[at] * c)
        assert not dw[torch.arange(n) != at].any()
