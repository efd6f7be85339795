"""The Triton backend on a GPU: what the interpreter can't show; ``make gpu-bench`` runs it.

Without a GPU and with ``TRITON_INTERPRET=1`` the same lines run dry on a CPU, at tiny sizes and
without bf16, which the interpreter truncates. What a dry run can't do: capture a CUDA graph (the
step is run again instead), see a wait of the host, and compute-sanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_layers
import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finegates import FusedGatedLinear, GateConfig, use_backend
from finegates.ops import (
    INTERPRETED,
    gated_matmul,
    norm_gather,
    open_mass,
    pruned_linear,
    reference,
)
from gated_case import FOLD, FROZEN, FUSED, PRETRAINING, check, in_order, make
from numerics import assert_no_worse

GPU = torch.cuda.is_available() and not INTERPRETED
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (GPU or INTERPRETED), reason="no GPU, and TRITON_INTERPRET=1 is not set"
    ),
]


def full(size: Any, tiny: Any) -> Any:
    """Return what a test takes on a GPU, or in a dry run."""
    return size if GPU else tiny


DEVICE = full("cuda", "cpu")
HALF = full(torch.bfloat16, torch.float16)
DTYPES = full([torch.float32, torch.float16, torch.bfloat16], [torch.float32, torch.float16])
DTYPE_IDS = ["fp32", "fp16", "bf16"][: len(DTYPES)]
DISTRIBUTIONS = ["gaussian", "hard_concrete", "ranking"]
SHAPES = full(
    [(65, 129, 200), (1, 768, 768), (33, 768, 3072), (1000, 2048, 2048), (4096, 768, 768)],
    [(65, 17, 33)],
)


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    """Fall back to nothing: what is tested is Triton's."""
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("mask", [FROZEN, PRETRAINING], ids=["frozen", "pretraining"])
@pytest.mark.parametrize("how", [FUSED, FOLD], ids=["fused", "fold"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(
    shape: Any, dtype: torch.dtype, distribution: str, how: Any, mask: list[bool]
) -> None:
    check(make(*shape, dtype=dtype, distribution=distribution).to(DEVICE), how, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("m", full([5, 129, 2048], [5, 65]))
@pytest.mark.parametrize("multiple", [1, 16])
def test_compact_weight_and_closed_gradients(multiple: int, m: int, dtype: torch.dtype) -> None:
    n, k = full((640, 768), (64, 80))
    shape = (m, n, k if multiple == 16 else k + 2)
    check(make(*shape, dtype, "ranking", closed_grad=True).to(DEVICE), FUSED, FROZEN)
    case = in_order(make(*shape, dtype, "ranking"), multiple).to(DEVICE)
    assert min(case.w.shape) >= 16
    check(case, FUSED, FROZEN)
    check(case, FUSED, PRETRAINING)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("m", full([1, 32, 500], [1, 66]))
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_pruned_linear(activation: str, m: int, dtype: torch.dtype) -> None:
    n_out, k_in, n, k = full((1536, 768, 1111, 601), (48, 40, 31, 25))
    rows = torch.randperm(n_out)[:n].sort().values.int().to(DEVICE)
    columns = torch.randperm(k_in)[:k].sort().values.int().to(DEVICE)
    x, w = torch.randn(m, k_in).to(DEVICE, dtype), (torch.randn(n, k) / k**0.5).to(DEVICE, dtype)
    b, residual = torch.randn(n).to(DEVICE, dtype), torch.randn(m, n_out).to(DEVICE, dtype)
    args = (x, w, b, rows, columns, n_out)
    y = pruned_linear(*args, activation=activation, residual=residual, backend="triton")
    wide = (x.double(), w.double(), b.double(), rows, columns, n_out)
    exact = reference.pruned_linear(*wide, activation, residual.double())
    assert_no_worse(y, reference.pruned_linear(*args, activation, residual), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_norm_gather_and_open_mass(norm: str, dtype: torch.dtype) -> None:
    k, kept = full((2048, 1501), (64, 41))
    x = torch.randn(7, k).to(DEVICE, dtype)
    columns = torch.randperm(k)[:kept].sort().values.int().to(DEVICE)
    y = norm_gather(x, columns, norm=norm, backend="triton")
    plain = reference.norm_gather(x, columns, None, None, 1e-6, norm)
    exact = reference.norm_gather(x.double(), columns, None, None, 1e-6, norm)
    assert_no_worse(y, plain, exact)
    logits, offsets = torch.randn(5000).to(DEVICE), torch.tensor([0, 10, 3000, 5000]).to(DEVICE)
    mass = open_mass(logits, offsets, "gaussian", 0.5, 0.5, backend="triton")
    expected = reference.open_mass(logits, offsets, "gaussian", 0.5, 0.5)
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_bitwise_run_to_run(distribution: str, dtype: torch.dtype) -> None:
    case = make(*full((4096, 3072, 768), (33, 48, 32)), dtype, distribution).to(DEVICE)
    for forward, backward in (FUSED, FOLD):
        y, r, c = forward(case.call())
        args = (case.call(), torch.randn_like(y), y, r, c, PRETRAINING)
        first = [y, *backward(*args)]
        for _ in range(5):
            again = [forward(case.call())[0], *backward(*args)]
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


TOKENS, IN, OUT = full((256, 768, 3072), (65, 32, 48))


def layer_of(distribution: str) -> FusedGatedLinear:
    config = GateConfig(distribution=distribution)
    layer = FusedGatedLinear(IN, OUT, device=DEVICE, dtype=HALF, config=config)
    layer.weight.requires_grad_(False)
    return layer


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let a wait of the host raise; a dry run has none to see."""
    if not GPU:
        yield
        return
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """Return the outputs of a CUDA graph of ``run``, and its replay, which fills them anew."""
    if not GPU:
        outputs = run()

        def replay() -> None:
            for old, new in zip(outputs, run(), strict=True):
                old.copy_(new)

        return outputs, replay
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return outputs, graph.replay


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_step_waits_for_nothing(distribution: str) -> None:
    layer = layer_of(distribution)
    x = torch.randn(TOKENS, IN, device=DEVICE, dtype=HALF, requires_grad=True)
    layer(x).float().square().mean().backward()
    with no_waiting():
        layer(x).float().square().mean().backward()


@pytest.mark.parametrize("how", ["fused", "fold"])
@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
def test_a_captured_step_is_the_eager_one(distribution: str, how: str) -> None:
    """Forward and backward in one CUDA graph: replays follow the seed, to the bit."""
    case = make(TOKENS, OUT, IN, HALF, distribution).to(DEVICE)
    leaves = [t.requires_grad_() for t in (case.x, case.b, case.row_logits, case.column_logits)]
    dy = torch.randn(TOKENS, OUT, device=DEVICE, dtype=HALF)
    assert case.seed is not None
    first = case.seed.clone()

    def step() -> list[Tensor]:
        y = gated_matmul(
            case.x, case.w, case.b, case.row_logits, case.column_logits, case.seed,
            distribution, case.config.constants, backend="triton",
        )  # fmt: skip
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    with gpu_layers.chosen(how):
        outputs, replay = captured(step)
        seen = []
        for seed in (first, first + 1):
            case.seed.copy_(seed)
            replay()
            seen.append([t.clone() for t in outputs])
            assert all(torch.equal(a, b) for a, b in zip(seen[-1], step(), strict=True))
    assert all((a != b).any() for a, b in zip(*seen, strict=True))


def test_a_captured_layer_draws_new_gates_at_every_replay() -> None:
    layer = layer_of("gaussian")
    with torch.no_grad():
        layer.row_gate.logits.zero_()  # type: ignore[union-attr]
    x = torch.randn(TOKENS, IN, device=DEVICE, dtype=HALF)
    with torch.no_grad():
        (y,), replay = captured(lambda: [layer(x)])
        replay()
        first = y.clone()
        replay()
    assert (first != y).any()


def step(
    forward: Callable[[Tensor], Tensor], layer: FusedGatedLinear, dtype: torch.dtype = HALF
) -> list[Tensor]:
    """Return y and the gradients of x and all that is trained, from one seed and one x."""
    x = torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    x.requires_grad_()
    torch.manual_seed(2)
    y = forward(x)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.float().square().mean(), [x, *trained])]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_training_step_compiles_whole_with_inductor(distribution: str) -> None:
    """With torch's generator for the seed: inductor's own draws other numbers."""
    layer = layer_of(distribution)
    plain = step(layer, layer)
    torch.compiler.reset()
    with torch._inductor.config.patch(fallback_random=True):
        found = step(torch.compile(layer, fullgraph=True, backend="inductor"), layer)
    torch.compiler.reset()
    for ours, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_checkpointed_step_is_the_plain_one(distribution: str) -> None:
    """Autograd's own thread recomputes it, with the generator put back."""
    layer = layer_of(distribution)
    found = step(lambda x: checkpoint(layer, x, use_reentrant=False), layer)
    for ours, expected in zip(found, step(layer, layer), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_autocast_is_a_step_in_the_narrow_dtype(distribution: str) -> None:
    wide, narrow = layer_of(distribution).float(), layer_of(distribution)
    narrow.load_state_dict(wide.state_dict())
    expected = step(narrow, narrow)
    with torch.autocast(DEVICE, HALF):
        found = step(wide, wide, torch.float32)
    assert found[0].dtype == HALF
    assert all(gradient.dtype == torch.float32 for gradient in found[1:])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.to(theirs.dtype), theirs)


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not GPU, reason="compute-sanitizer watches a GPU")
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
