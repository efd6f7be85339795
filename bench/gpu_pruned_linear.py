"""Inference of a pruned Linear on a GPU against the dense one, CUDA graphs on both sides.

Bar: at least 1.4 times dense with 40 % removed, for 1 and 32 tokens. ``--dry-run`` runs
every line once on a CPU, the kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import assert_correct, device_name, graphed, row, time_interleaved, write
from shapes import GPU_DECODE, GPU_LAYERS, GPU_TINY, REMOVED, kept

from finegates.ops import pruned_linear, reference

RESULTS = Path(__file__).parent / "results" / "gpu"
BAR = 1.4


def candidates(
    shape: tuple[int, int, bool], m: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, Callable[[], Any]], float]:
    """Return dense, gather + compact + scatter in torch, and ours; and the share of w kept."""
    n, k, _ = shape
    g = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device=device).to(dtype)

    def keep(size: int) -> torch.Tensor:
        order = torch.randperm(size, generator=g, device=device)
        return order[: kept(size, REMOVED)].sort().values.int()

    rows, columns = keep(n), keep(k)
    x, w, b = draw(m, k), draw(n, k) / k**0.5, draw(n)
    compact, bias = w[rows.long()][:, columns.long()].contiguous(), b[rows.long()]
    args = (x, compact, bias, rows, columns, n)
    wide = (x.double(), compact.double(), bias.double(), rows, columns, n)
    ours = pruned_linear(*args, backend="triton")
    assert_correct(
        "pruned_linear", ours, reference.pruned_linear(*args), reference.pruned_linear(*wide)
    )
    return {
        "dense": lambda: F.linear(x, w, b),
        "torch": lambda: reference.pruned_linear(*args),
        "finegates": lambda: pruned_linear(*args, backend="triton"),
    }, compact.numel() / w.numel()


@torch.no_grad()
def run(arguments: argparse.Namespace) -> int:
    """Time all layers; return 1 if the bar was measured and missed."""
    device = "cpu" if arguments.dry_run else "cuda"
    dtype = torch.float16 if arguments.dry_run else torch.bfloat16
    rows, missed = [], 0
    for name, shape in (GPU_TINY if arguments.dry_run else GPU_LAYERS).items():
        for m in GPU_DECODE:
            runs, share = candidates(shape, m, dtype, device)
            graphs = {provider: graphed(one, device) for provider, one in runs.items()}
            times = time_interleaved(graphs, device, arguments.repeats)
            config = f"{name} {shape[0]}x{shape[1]} {dtype}"
            for provider, y in times.items():
                rows.append(
                    row("pruned_linear", provider, "forward", "speed", "ms", ("M", "tokens", m), y,
                        config, device, 1.0 if provider == "dense" else share, 1.0 / share)
                )  # fmt: skip
            ratio = times["dense"][0] / times["finegates"][0]
            met = ratio >= BAR
            missed += not met
            sys.stdout.write(
                f"{name} M={m}: {ratio:.2f} x dense, ideal {1.0 / share:.2f}; "
                f"{'met' if met else 'MISSED'}: {BAR}\n"
            )
    write(arguments.output, rows)
    sys.stdout.write(f"{len(rows)} rows of {device_name(device)} in {arguments.output}\n")
    return 0 if arguments.dry_run else int(missed > 0)


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULTS / "pruned_linear.csv")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.stderr.write("no GPU here; --dry-run runs every line on a CPU\n")
        return 2
    return run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
