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
from finegates.kernels.fold import fold_fwd
from finegates.kernels.gate import gate_tile
from finegates.kernels.gated_matmul import gated_matmul_fwd
from finegates.kernels.operands import Gates, Weight
from finegates.ops import reference

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


def columns_of(size: int, distribution: str, logit: float, seed: list[int]) -> Tensor:
    """Sample ``size`` column gates of one logit."""
    constants = GateConfig(distribution=distribution).constants
    c = torch.full((size,), float("nan"))
    logits = torch.full((size,), logit)
    _sample_kernel[(triton.cdiv(size, 65536),)](
        c, logits, torch.tensor(seed), size, *constants,
        DISTRIBUTION=distribution, SIDE=1, BLOCK=65536,
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
    z = columns_of(DRAWS, distribution, logit, [0, 12345]).double().numpy()
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
        z = columns_of(10_000, distribution, 0.0, [3, 2**31 + 7])
        expected = reference.gate(
            torch.zeros(10_000), torch.tensor([2**31 + 7]), [10_000, 10_000], 10_000, distribution,
            *config.constants,
        )  # fmt: skip
        torch.testing.assert_close(z, expected, atol=2e-6, rtol=0)


def test_rows_columns_layers_and_steps_are_independent() -> None:
    """Correlation of 1e5 pairs within 4 / √1e5 of 0, and neighbours within a vector as well."""
    n = 100_000
    vectors = [columns_of(n, "gaussian", -0.5, [0, seed]) for seed in (1, 2, 3, 2**31 - 2)]
    samples = [v.double() for v in vectors]
    pairs = [(samples[i], samples[j]) for i in range(4) for j in range(i)]
    pairs += [(v[:-1], v[1:]) for v in samples]
    for a, b in pairs:
        correlation = torch.corrcoef(torch.stack((a, b)))[0, 1]
        assert abs(correlation.item()) < 4.0 / math.sqrt(n)


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


def test_every_kernel_draws_the_same() -> None:
    """The GEMM's two sides and the fold agree bit for bit, whatever the tile."""
    n, k = 130, 600
    shift, scale, beta = GateConfig(distribution="gaussian").constants
    gates = Gates(
        row="gaussian",
        column="gaussian",
        row_logits=torch.randn(n),
        column_logits=torch.randn(k),
        seed=torch.tensor([5, 6]),
        row_layout=(n, n),
        column_layout=(k, k),
        shift=shift,
        scale=scale,
        beta=beta,
    )
    w = torch.randn(n, k)
    vectors = []
    for run in (
        lambda gates: fold_fwd(w, None, gates),
        lambda gates: gated_matmul_fwd(torch.ones(3, k), Weight(w), gates),
    ):
        r, c = torch.full((n,), float("nan")), torch.full((k,), float("nan"))
        run(gates._replace(r=r, c=c))
        vectors.append((r, c))
    for a, b in zip(*vectors, strict=True):
        assert torch.equal(a, b)
