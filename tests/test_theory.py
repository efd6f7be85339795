"""The objective's shape on a linear model: gates satisfy the PL inequality, LoRA's start doesn't.

f = ½ ‖y - t‖² satisfies the Polyak-Łojasiewicz inequality where ½ ‖∇f‖² ≥ μ (f - min f), which
makes gradient descent converge linearly. With J the Jacobian of y in the trained parameters and
e = y - t, ∇f = Jᵀ e, so that μ = λ_min(J Jᵀ) does wherever min f = 0.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacrev

from finegates import FusedGatedLinear, GateConfig
from finegates.nn import LoRA
from finegates.ops import gated_linear


def gated(distribution: str) -> FusedGatedLinear:
    """Return a gated Linear in evaluation, 6 + 9 gates that start halfway open."""
    layer = FusedGatedLinear(
        9, 6, dtype=torch.float64, config=GateConfig(distribution=distribution, init_mean=0.0)
    )
    return layer.requires_grad_(False).eval()


def set_logits_(layer: FusedGatedLinear, logits: Tensor) -> None:
    assert layer.row_gate is not None
    assert layer.column_gate is not None
    with torch.no_grad():
        layer.row_gate.logits.copy_(logits[:6])
        layer.column_gate.logits.copy_(logits[6:])


def jacobian(layer: FusedGatedLinear, x: Tensor, logits: Tensor) -> Tensor:
    """Return ∂y/∂θ [outputs, gates] in fp64."""

    def outputs(logits: Tensor) -> Tensor:
        gates = {"row_gate.logits": logits[:6], "column_gate.logits": logits[6:]}
        y: Tensor = functional_call(layer, gates, (x,))
        return y.flatten()

    return jacrev(outputs)(logits).double()


@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
def test_gates_satisfy_the_inequality_along_training(distribution: str) -> None:
    torch.manual_seed(1)
    layer, x = gated(distribution), torch.randn(2, 9, dtype=torch.float64)
    set_logits_(layer, 0.2 * torch.randn(15))
    target = layer(x).flatten()
    logits = torch.zeros(15)
    set_logits_(layer, logits)
    first = 0.5 * (layer(x).flatten() - target).square().sum()
    promised = torch.tensor(torch.inf)
    for _ in range(200):
        set_logits_(layer, logits)
        error = layer(x).flatten() - target
        j = jacobian(layer, x, logits)
        gradient, loss = j.T @ error, 0.5 * error.square().sum()
        assert loss <= promised
        eigenvalues = torch.linalg.eigvalsh(j @ j.T)
        mu, steepest = eigenvalues[0], eigenvalues[-1]
        assert mu > 1e-4 * steepest
        assert 0.5 * gradient.square().sum() >= mu * loss * (1 - 1e-9)
        logits = logits - (gradient / steepest).float()
        # The rate that follows from the inequality at step size 1 / λ_max; half of it leaves room
        # for the curvature that J J^T leaves out.
        promised = (1 - 0.5 * mu / steepest) * loss
    assert loss < 0.01 * first


def test_lora_violates_it_at_its_degenerate_point() -> None:
    """At A = B = 0 the gradient is 0 and the loss is not; beside it no μ holds either."""
    torch.manual_seed(1)
    lora = LoRA(9, 6, GateConfig(lora_rank=2), dtype=torch.float64)
    x, target = torch.randn(2, 9, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    down, up = torch.randn_like(lora.down), torch.randn_like(lora.up)
    ratios = []
    for size in (1e-1, 1e-2, 1e-3, 0.0):
        with torch.no_grad():
            lora.down.copy_(size * down)
            lora.up.copy_(size * up)
        # Rank 2 meets any target on two inputs: min f = 0.
        loss = 0.5 * (lora(x, None, None) - target).square().sum()
        gradients = torch.autograd.grad(loss, list(lora.parameters()))
        ratios.append(0.5 * sum(g.square().sum() for g in gradients) / loss)
    assert ratios[3] == 0.0
    assert loss > 1.0
    assert ratios[1] < 0.02 * ratios[0]
    assert ratios[2] < 0.02 * ratios[1]


M, N, K = 40, 12, 8


def smallest_singular_value(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix).min())


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, a full-rank frozen w, and targets that no gates reach."""
    g = torch.Generator().manual_seed(seed)
    x, w, y = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((M, K), (N, K), (M, N)))
    return x, w, y


def design(x: Tensor, w: Tensor, side: str) -> Tensor:
    """Return D with vec(y) = D z for the gates z of one side, the other side open."""
    if side == "row":
        return torch.einsum("mn,nj->mnj", x @ w.t(), torch.eye(N).double()).flatten(0, 1)
    return torch.einsum("nk,mk->mnk", w, x).flatten(0, 1)


@pytest.mark.parametrize("side", ["row", "column"])
@pytest.mark.parametrize("seed", range(3))
def test_one_side_satisfies_it_with_a_constant_of_the_data(side: str, seed: int) -> None:
    """½ |∇L|² ≥ μ (L - L*) at every step, μ from x and w alone, and so L falls linearly."""
    x, w, y = problem(seed)
    d = design(x, w, side)
    best = torch.linalg.lstsq(d, y.flatten()[:, None]).solution
    least = 0.5 * (d @ best - y.flatten()[:, None]).square().sum()
    of_w = smallest_singular_value(w) ** 2 if side == "column" else float(w.square().sum(1).min())
    mu = smallest_singular_value(x) ** 2 * of_w
    assert 0 < mu <= smallest_singular_value(d) ** 2
    smoothness = float(torch.linalg.svdvals(d).max()) ** 2
    z = torch.ones(N if side == "row" else K, dtype=torch.float64, requires_grad=True)
    gaps = []
    for _ in range(200):
        r, c = (z, None) if side == "row" else (None, z)
        loss = 0.5 * (gated_linear(x, w, None, r, c) - y).square().sum()
        (gradient,) = torch.autograd.grad(loss, z)
        gaps.append(float(loss.detach() - least))
        assert 0.5 * gradient.square().sum() >= mu * gaps[-1] - 1e-9
        with torch.no_grad():
            z -= gradient / smoothness
    bound = [gaps[0] * (1.0 - mu / smoothness) ** step for step in range(200)]
    assert all(gap <= limit + 1e-9 for gap, limit in zip(gaps, bound, strict=True))
    assert gaps[-1] < 0.5 * gaps[0]


def test_gates_on_both_sides_have_that_point_too() -> None:
    """r = c = 0 is as flat: the statement is about one trained side. Gates start open."""
    x, w, y = problem(0)
    r, c = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (N, K))
    (0.5 * (gated_linear(x, w, None, r, c) - y).square().sum()).backward()
    assert r.grad is not None
    assert c.grad is not None
    assert r.grad.abs().max() == 0
    assert c.grad.abs().max() == 0
