"""The Triton backend on a GPU: what the interpreter can't show; ``make gpu-bench`` runs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finegates import FusedGatedLinear, GateConfig
from finegates.ops import norm_gather, open_mass, pruned_linear, reference
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


@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
def test_no_host_sync_and_cuda_graph(distribution: str) -> None:
    """A step waits for nothing, and a captured one draws new gates at every replay."""
    layer = layer_of(distribution)
    x = torch.randn(256, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        layer.row_gate.logits.zero_()  # type: ignore[union-attr]
    layer(x).float().square().mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).float().square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x)
    torch.cuda.synchronize()
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


def test_compute_sanitizer_is_clean() -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    picked = "test_forward_and_gradients and (65 or 33) or test_compact_weight"
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-k", picked]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [*command, __file__], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
