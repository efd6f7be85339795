"""A training step of a gated Linear on a GPU: frozen Linear, naive gates, compiled naive, ours.

``python bench/bench_gated_linear.py`` prints the bars of docs/kernels.md and writes a CSV with
Liger's columns to ``bench/results/gpu``. ``--dry-run`` runs every line once on a CPU, the kernels
in Triton's interpreter (``TRITON_INTERPRET=1``), and measures nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import assert_correct, device_name, peak_bytes, row, time_interleaved, write
from shapes import GPU_LAYERS, GPU_TINY, GPU_TINY_TOKENS, GPU_TOKENS
from torch import Tensor

from finegates import GateConfig
from finegates.ops import _triton_gated, gated_linear, gated_matmul

RESULTS = Path(__file__).parent / "results" / "gpu"
# A step over the frozen Linear's, at most: by the start of the layer's name.
BARS = {"roberta-base": 1.25, "llama-1b": 1.10, "llama-7b": 1.10}
COMPILED_BAR = 1.5  # times faster than torch.compile of naive gates, at RoBERTa-base


class Layer:
    """One layer's operands and its providers: functions of nothing that return y."""

    def __init__(
        self,
        shape: tuple[int, int, bool],
        m: int,
        dtype: torch.dtype,
        distribution: str,
        device: str,
    ) -> None:
        n, k, bias = shape
        g = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, device=device)

        self.config = GateConfig(distribution=distribution)
        self.x = draw(m, k).to(dtype).requires_grad_()
        self.w = (draw(n, k) / k**0.5).to(dtype)
        self.b = draw(n).to(dtype).requires_grad_() if bias else None
        start = self.config.start_logit
        self.row_logits = (start + 0.3 * draw(n)).requires_grad_()
        self.column_logits = (start + 0.3 * draw(k)).requires_grad_()
        self.dy = draw(m, n).to(dtype)
        self.device = device

    def trained(self) -> list[Tensor]:
        leaves = (self.x, self.b, self.row_logits, self.column_logits)
        return [t for t in leaves if t is not None]

    def frozen(self) -> Tensor:
        return F.linear(self.x, self.w, self.b)

    def naive(self) -> Tensor:
        return _naive(self.x, self.w, self.b, self.row_logits, self.column_logits, self.config)

    def ours(self) -> Tensor:
        seed = torch.randint(0, 2**31 - 1, (2,), device=self.device)
        return gated_matmul(
            self.x, self.w, self.b, self.row_logits, self.column_logits, seed,
            self.config.distribution, self.config.constants, backend="triton",
        )  # fmt: skip


def _naive(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    row_logits: Tensor,
    column_logits: Tensor,
    config: GateConfig,
) -> Tensor:
    """The authors' way: sample with torch ops, multiply x and y elementwise."""
    r, c = (_sample(logits, config).to(x.dtype) for logits in (row_logits, column_logits))
    return F.linear(x * c, w, b) * r


def _sample(logits: Tensor, config: GateConfig) -> Tensor:
    shift, scale, beta = config.constants
    if config.distribution == "gaussian":
        z = torch.tanh(logits) + shift + scale * torch.randn_like(logits)
    else:
        u = torch.rand_like(logits).clamp(1e-6, 1.0 - 1e-6)
        z = shift + scale * torch.sigmoid((torch.logit(u) + logits) / beta)
    return z.clamp(0.0, 1.0)


def choosing(which: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """Return ``run`` with the choice between fused and fold taken by hand."""
    reason = "the benchmark wants the other one"
    answer = (None, reason) if which == "fused" else (reason, None)

    def forced() -> Any:
        choose, _triton_gated._fold_wins = _triton_gated._fold_wins, lambda *_: answer
        try:
            return run()
        finally:
            _triton_gated._fold_wins = choose

    return forced


def step(layer: Layer, run: Callable[[], Tensor]) -> Callable[[], Any]:
    """Return forward and backward to everything that is trained."""

    def full() -> Any:
        return torch.autograd.grad(run(), layer.trained(), layer.dy, allow_unused=True)

    return full


def check(layer: Layer) -> None:
    """Compare both ways with fp64 for the gates 0.25 … 1, before anything is timed."""
    n, k = layer.w.shape
    r = torch.linspace(0.25, 1.0, n, device=layer.device).to(layer.w.dtype)
    c = torch.linspace(1.0, 0.25, k, device=layer.device).to(layer.w.dtype)
    b = None if layer.b is None else layer.b.detach()
    x = layer.x.detach()
    exact = F.linear(x.double() * c.double(), layer.w.double(), None if b is None else b.double())
    plain = F.linear(x * c, layer.w, b) * r
    ours = gated_linear(x, layer.w, b, r, c, backend="triton")
    assert_correct("gated_linear", ours, plain, exact * r.double())


def run(arguments: argparse.Namespace) -> int:
    """Time all layers; return 1 if a bar was measured and missed."""
    device = "cpu" if arguments.dry_run else "cuda"
    layers = GPU_TINY if arguments.dry_run else GPU_LAYERS
    tokens = GPU_TINY_TOKENS if arguments.dry_run else GPU_TOKENS
    dtype = torch.float16 if arguments.dry_run else getattr(torch, arguments.dtype)
    compiled = torch.compile(_naive, backend="eager" if arguments.dry_run else "inductor")
    rows, missed = [], 0
    for name, shape in layers.items():
        if not name.startswith(arguments.layer):
            continue
        for m in tokens:
            layer = Layer(shape, m, dtype, arguments.distribution, device)
            check(layer)
            providers: dict[str, Callable[[], Tensor]] = {
                "frozen": layer.frozen,
                "naive": layer.naive,
                "compiled": partial(
                    compiled,
                    layer.x,
                    layer.w,
                    layer.b,
                    layer.row_logits,
                    layer.column_logits,
                    layer.config,
                ),
                "finegates": layer.ours,
                "finegates-fused": choosing("fused", layer.ours),
                "finegates-fold": choosing("fold", layer.ours),
            }
            steps = {
                provider: choosing(provider.removeprefix("finegates-"), step(layer, forward))
                if "-" in provider
                else step(layer, forward)
                for provider, forward in providers.items()
            }
            config = f"{name} {shape[0]}x{shape[1]} {dtype} {arguments.distribution}"
            for mode, candidates in (("forward", providers), ("full", steps)):
                times = time_interleaved(candidates, device, arguments.repeats)
                for provider, y in times.items():
                    rows.append(
                        row("gated_linear", provider, mode, "speed", "ms", ("M", "tokens", m), y,
                            config, device)
                    )  # fmt: skip
            for provider, full in steps.items():
                peak = (peak_bytes(full, device) / 2**20,) * 3
                rows.append(
                    row("gated_linear", provider, "full", "memory", "MB", ("M", "tokens", m), peak,
                        config, device)
                )  # fmt: skip
            missed += report(name, m, {p: y[0] for p, y in times.items()})
    write(arguments.output, rows)
    sys.stdout.write(f"{len(rows)} rows of {device_name(device)} in {arguments.output}\n")
    return 0 if arguments.dry_run else int(missed > 0)


def report(name: str, m: int, milliseconds: dict[str, float]) -> int:
    """Print a step's times against the bars; return how many are missed."""
    ratio = milliseconds["finegates"] / milliseconds["frozen"]
    faster = milliseconds["compiled"] / milliseconds["finegates"]
    verdicts = []
    bar = next((bar for start, bar in BARS.items() if name.startswith(start)), None)
    if bar is not None:
        verdicts.append(f"{'met' if ratio <= bar else 'MISSED'}: at most {bar}")
    if name.startswith("roberta-base"):
        met = faster >= COMPILED_BAR
        verdicts.append(f"{'met' if met else 'MISSED'}: {COMPILED_BAR} times compiled")
    times = "  ".join(f"{provider} {ms:.3f}" for provider, ms in milliseconds.items())
    sys.stdout.write(
        f"{name} M={m}: {times} ms; {ratio:.2f} of frozen, {faster:.2f} x compiled"
        f"{''.join('; ' + verdict for verdict in verdicts)}\n"
    )
    return sum(verdict.startswith("MISSED") for verdict in verdicts)


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--layer", default="", help="start of the layers' names")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--distribution", default="gaussian", choices=("gaussian", "hard_concrete"))
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output", type=Path, default=RESULTS / "gated_linear.csv")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.stderr.write("no GPU here; --dry-run runs every line on a CPU\n")
        return 2
    return run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
