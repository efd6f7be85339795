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
