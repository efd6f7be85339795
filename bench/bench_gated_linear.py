"""A training step of a gated Linear on a GPU: frozen Linear, naive gates, compiled naive, ours.

``PYTHONPATH=.:tests python bench/bench_gated_linear.py`` prints the bars of docs/kernels.md. It
writes them, and a CSV with Liger's columns, to a folder of the card's name in
``bench/results/gpu``. Modes: ``forward`` and ``full`` (forward and backward) are device time of a
CUDA graph, for every provider, and the bars stand on ``full``; ``full-eager`` is wall time with the
host's work. ``--dry-run`` runs the same lines on a CPU, with `gpu_stand_in` for ``torch.cuda`` and
the kernels in Triton's interpreter (``TRITON_INTERPRET=1``); it checks what is computed and
measures nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from gpu_clock import Clock, Report, command_line, main, row
from gpu_layers import Layer, Provider, make, providers
from shapes import GPU_BARS, GPU_LAYERS, GPU_TINY, GPU_TINY_TOKENS, GPU_TOKENS

from finegates import GateConfig

COMPILED_BAR = 1.5  # times faster than torch.compile of naive gates, at RoBERTa-base
SEED_BYTES = 16
UNITS = {"speed": "ms", "memory": "MB", "held": "bytes"}


def correct(ways: dict[str, Provider], say: Callable[[str], object]) -> dict[str, Provider]:
    """Return the providers without those of ours that compute something else, and name these."""
    kept = {}
    for name, provider in ways.items():
        try:
            if name.startswith("finegates"):
                provider.check(name)
        except AssertionError as error:
            say(f"WRONG {error}")
        else:
            kept[name] = provider
    return kept


def measure(
    ways: dict[str, Provider], clock: Clock, repeats: int
) -> dict[tuple[str, str], dict[str, tuple[float, float, float]]]:
    """Return (p50, p20, p80) of every provider by mode and metric, in the units of `UNITS`."""
    forward = {name: provider.forward for name, provider in ways.items()}
    full = {name: provider.step for name, provider in ways.items()}
    found = {
        (mode, "speed"): clock.interleaved(
            {name: clock.graphed(run) for name, run in runs.items()}, clock.device_time, repeats
        )
        for mode, runs in (("forward", forward), ("full", full))
    }
    found["full-eager", "speed"] = clock.interleaved(full, clock.wall_time, repeats)
    found["full", "memory"] = {
        name: (clock.peak_bytes(run) / 2**20,) * 3 for name, run in full.items()
    }
    found["forward", "held"] = {name: (clock.held_bytes(run),) * 3 for name, run in forward.items()}
    return found


def judge(
    name: str,
    layer: Layer,
    milliseconds: dict[str, float],
    saved: float,
    say: Callable[[str], object],
) -> int:
    """Say a step's times, and the bytes saved for backward, against the bars.

    Returns:
        How many bars are missed.
    """
    n, k = layer.w.shape
    allowance = 4 * (n + k) + SEED_BYTES
    verdicts = [
        (saved <= allowance, f"saves {saved:.0f} bytes more than frozen, at most {allowance}")
    ]
    ratio = milliseconds["finegates"] / milliseconds["frozen"]
    faster = milliseconds["compiled"] / milliseconds["finegates"]
    bar = GPU_BARS.get(name.split(".")[0])
    if bar is not None:
        verdicts.append((ratio <= bar, f"{ratio:.2f} of frozen, at most {bar}"))
    if name.startswith("roberta-base"):
        verdicts.append((faster >= COMPILED_BAR, f"{faster:.2f} x compiled, {COMPILED_BAR} wanted"))
    times = "  ".join(f"{provider} {ms:.3f}" for provider, ms in milliseconds.items())
    say(f"{name} M={layer.x.shape[0]}: step in ms: {times}")
    for met, what in verdicts:
        say(f"  {'met' if met else 'MISSED'}: {what}")
    return sum(not met for met, _ in verdicts)


@torch._dynamo.config.patch(error_on_recompile=True)
def run(arguments: argparse.Namespace) -> int:
    """Time all layers; return 1 if a result was wrong, or a bar was measured and missed."""
    dry = arguments.dry_run
    torch.manual_seed(0)
    clock = Clock(dry)
    dtype = torch.float16 if dry else getattr(torch, arguments.dtype)
    config = GateConfig(distribution=arguments.distribution)
    report = Report(arguments.output, clock.name, "gated_linear.csv")
    wrong = missed = 0
    for name, shape in (GPU_TINY if dry else GPU_LAYERS).items():
        if not name.startswith(arguments.layer):
            continue
        for m in GPU_TINY_TOKENS if dry else GPU_TOKENS:
            layer = make(shape, m, dtype, config, clock.device)
            every = providers(layer, "eager" if dry else "inductor")
            ways = correct(every, report.say)
            wrong += len(every) - len(ways)
            found = measure(ways, clock, arguments.repeats)
            label = f"{name} {shape[0]}x{shape[1]} {dtype} {arguments.distribution}"
            for (mode, metric), values in found.items():
                for provider, y in values.items():
                    report.rows.append(
                        row("gated_linear", provider, mode, metric, UNITS[metric],
                            ("M", "tokens", m), y, label, clock.name, ways[provider].layer.kept)
                    )  # fmt: skip
            report.write()
            if "finegates" in ways:
                held = found["forward", "held"]
                saved = held["finegates"][0] - held["frozen"][0]
                steps = {provider: y[0] for provider, y in found["full", "speed"].items()}
                missed += judge(name, layer, steps, saved, report.say)
    report.end()
    return int(wrong > 0 or (missed > 0 and not dry))


if __name__ == "__main__":
    parser = command_line(__doc__, repeats=50)
    parser.add_argument("--layer", default="", help="start of the layers' names")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--distribution", default="gaussian", choices=("gaussian", "hard_concrete"))
    raise SystemExit(main(parser, run))
