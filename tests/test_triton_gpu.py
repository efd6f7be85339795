"""The Triton backend on a GPU: what the interpreter can't show; ``make gpu-bench`` runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finegates import FusedGatedLinear, GateConfig
from finegates.ops import (
    gated_matmul,
    norm_gather,
    open_mass,
    pruned_linear,
    reference,
)
from gated_case import FOLD, FROZEN, FUSED, PRETRAINING, check, make
from numerics import assert_no_worse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE_IDS = ["fp32", "fp16", "bf16"]
DISTRIBUTIONS = ["gaussian", "hard_concrete", "ranking"]
SHAPES = [(65, 129, 200), (1, 768, 768), (33, 768, 3072), (1000, 2048, 2048), (4096, 768, 768)]


@pytest.mark.parametrize("mask", [FROZEN, PRETRAINING], ids=["frozen", "pretraining"])
@pytest.mark.parametrize("how", [FUSED, FOLD], ids=["fused", "fold"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(
    shape: Any, dtype: torch.dtype, distribution: str, how: Any, mask: list[bool]
) -> None:
    check(make(*shape, dtype=dtype, distribution=distribution).to("cuda"), how, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("m", [5, 129, 2048])
def test_compact_weight_and_closed_gradients(m: int, dtype: torch.dtype) -> None:
    case = make(m, 640, 770, dtype, "ranking")
    check(make(m, 640, 770, dtype, "ranking", closed_grad=True).to("cuda"), FUSED, FROZEN)
    assert case.row_logits is not None
    assert case.column_logits is not None
    assert case.b is not None
    case.rows = (case.row_logits > 0).nonzero().squeeze(1).int()
    case.columns = (case.column_logits > 0).nonzero().squeeze(1).int()
    case.w = case.w[case.rows.long()][:, case.columns.long()].contiguous()
    case.b = case.b[case.rows.long()]
    check(case.to("cuda"), FUSED, FROZEN)
    check(case.to("cuda"), FUSED, PRETRAINING)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("m", [1, 32, 500])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_pruned_linear(activation: str, m: int, dtype: torch.dtype) -> None:
    n_out, k_in = 1536, 768
    rows = torch.randperm(n_out)[:1111].sort().values.int().cuda()
    columns = torch.randperm(k_in)[:601].sort().values.int().cuda()
    x, w = torch.randn(m, k_in).to("cuda", dtype), (torch.randn(1111, 601) / 25).to("cuda", dtype)
    b, residual = torch.randn(1111).to("cuda", dtype), torch.randn(m, n_out).to("cuda", dtype)
    args = (x, w, b, rows, columns, n_out)
    y = pruned_linear(*args, activation=activation, residual=residual, backend="triton")
    wide = (x.double(), w.double(), b.double(), rows, columns, n_out)
    exact = reference.pruned_linear(*wide, activation, residual.double())
    assert_no_worse(y, reference.pruned_linear(*args, activation, residual), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_norm_gather_and_open_mass(norm: str, dtype: torch.dtype) -> None:
    x = torch.randn(7, 2048).to("cuda", dtype)
    columns = torch.randperm(2048)[:1501].sort().values.int().cuda()
    y = norm_gather(x, columns, norm=norm, backend="triton")
    plain = reference.norm_gather(x, columns, None, None, 1e-6, norm)
    exact = reference.norm_gather(x.double(), columns, None, None, 1e-6, norm)
    assert_no_worse(y, plain, exact)
    logits, offsets = torch.randn(5000).cuda(), torch.tensor([0, 10, 3000, 5000]).cuda()
    mass = open_mass(logits, offsets, "gaussian", 0.5, 0.5, backend="triton")
    expected = reference.open_mass(logits, offsets, "gaussian", 0.5, 0.5)
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_bitwise_run_to_run(distribution: str, dtype: torch.dtype) -> None:
    case = make(4096, 3072, 768, dtype, distribution).to("cuda")
    for forward, backward in (FUSED, FOLD):
        y, r, c = forward(case.call())
        args = (case.call(), torch.randn_like(y), y, r, c, PRETRAINING)
        first = [y, *backward(*args)]
        for _ in range(5):
            again = [forward(case.call())[0], *backward(*args)]
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def layer_of(distribution: str) -> FusedGatedLinear:
    config = GateConfig(distribution=distribution)
    layer = FusedGatedLinear(768, 3072, device="cuda", dtype=torch.bfloat16, config=config)
    layer.weight.requires_grad_(False)
    return layer


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_step_waits_for_nothing(distribution: str) -> None:
    layer = layer_of(distribution)
    x = torch.randn(256, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().square().mean().backward()
    try:
        torch.cuda.set_sync_debug_mode("error")
        layer(x).float().square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("how", ["fused", "fold"])
@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
def test_a_captured_step_is_the_eager_one(
    distribution: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward in one CUDA graph: replays follow the seed, to the bit."""
    case = make(256, 3072, 768, torch.bfloat16, distribution).to("cuda")
    leaves = [t.requires_grad_() for t in (case.x, case.b, case.row_logits, case.column_logits)]
    dy = torch.randn(256, 3072, device="cuda", dtype=torch.bfloat16)
    assert case.seed is not None
    first = case.seed.clone()

    def step() -> list[torch.Tensor]:
        y = gated_matmul(
            case.x, case.w, case.b, case.row_logits, case.column_logits, case.seed,
            distribution, case.config.constants, backend="triton",
        )  # fmt: skip
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = []
    for seed in (first, first + 1):
        case.seed.copy_(seed)
        graph.replay()
        seen.append([t.clone() for t in captured])
        assert all(torch.equal(a, b) for a, b in zip(seen[-1], step(), strict=True))
    assert all((a != b).any() for a, b in zip(*seen, strict=True))


def test_a_captured_layer_draws_new_gates_at_every_replay() -> None:
    layer = layer_of("gaussian")
    with torch.no_grad():
        layer.row_gate.logits.zero_()  # type: ignore[union-attr]
    x = torch.randn(256, 768, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert (first != y).any()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_compiles_whole_with_inductor(distribution: str) -> None:
    layer = layer_of(distribution).eval()
    x = torch.randn(256, 768, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_is_clean(tool: str, request: pytest.FixtureRequest) -> None:
    """Every kernel, each tensor in an allocation of its own, so that none hides in a neighbour."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        needed = request.config.getoption("--need-sanitizer")
        (pytest.fail if needed else pytest.skip)("compute-sanitizer is not installed")
    script = Path(__file__).with_name("every_kernel.py")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)],
        cwd=script.parents[1], env={**environment, "PYTHONPATH": str(script.parents[1])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
