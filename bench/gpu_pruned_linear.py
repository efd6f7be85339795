"""Inference of a pruned Linear on a GPU against the dense one, CUDA graphs on both sides.

Bar: at least 1.4 times dense with 40 % removed, for 1 and 32 tokens. ``--dry-run`` runs the same
lines on a CPU, with `gpu_stand_in` for ``torch.cuda`` and the kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import Clock, Report, command_line, main, row
from shapes import GPU_DECODE, GPU_LAYERS, GPU_TINY, REMOVED, kept

from finegates.ops import pruned_linear, reference
from numerics import assert_no_worse

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
    assert_no_worse(ours, reference.pruned_linear(*args), reference.pruned_linear(*wide))
    return {
        "dense": lambda: F.linear(x, w, b),
        "torch": lambda: reference.pruned_linear(*args),
        "finegates": lambda: pruned_linear(*args, backend="triton"),
    }, compact.numel() / w.numel()


@torch.no_grad()
def run(arguments: argparse.Namespace) -> int:
    """Time all layers; return 1 if a result was wrong, or the bar was measured and missed."""
    dry = arguments.dry_run
    clock = Clock(dry)
    dtype = torch.float16 if dry else torch.bfloat16
    report = Report(arguments.output, clock.name, "pruned_linear.csv")
    wrong = missed = 0
    for name, shape in (GPU_TINY if dry else GPU_LAYERS).items():
        for m in GPU_DECODE:
            try:
                runs, share = candidates(shape, m, dtype, clock.device)
            except AssertionError as error:
                report.say(f"WRONG {name} M={m}: {error}")
                wrong += 1
                continue
            graphs = {provider: clock.graphed(one) for provider, one in runs.items()}
            times = clock.interleaved(graphs, clock.device_time, arguments.repeats)
            config = f"{name} {shape[0]}x{shape[1]} {dtype}"
            for provider, y in times.items():
                report.rows.append(
                    row("pruned_linear", provider, "forward", "speed", "ms", ("M", "tokens", m), y,
                        config, clock.name, 1.0 if provider == "dense" else share)
                )  # fmt: skip
            report.write()
            ratio = times["dense"][0] / times["finegates"][0]
            met = ratio >= BAR
            missed += not met
            report.say(
                f"{name} M={m}: {ratio:.2f} x dense, ideal {1.0 / share:.2f}; "
                f"{'met' if met else 'MISSED'}: {BAR}"
            )
    report.end()
    return int(wrong > 0 or (missed > 0 and not dry))


if __name__ == "__main__":
    raise SystemExit(main(command_line(__doc__, repeats=100), run))
