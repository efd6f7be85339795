"""A whole training step on the CPU: frozen dense model, masked gates, training on what is left.

``PYTHONPATH=.:tests python bench/training_step.py`` prints the table of docs/method.md. A step is
forward, backward and AdamW over biases and head (and gates, with their controller); weights are
frozen and random, 40 % of the gated ones are removed, and losses are compared before anything is
timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import harness
import torch
from harness import interleave, medians
from shapes import ENCODERS, REMOVED, SHRINK_EVERY, STEP_BATCH, STEP_LENGTH
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from finegates import GateConfig, GateMap, gate_
from finegates.surgery import GateController, freeze_
from finegates.surgery.shrink import shrink_

CONFIG = GateConfig(sparsity=REMOVED, warmup=0.0, ramp=0.0, shrink_every=SHRINK_EVERY)
STEPS = 10**9  # the schedule stays where it is while the clock runs


class Run:
    """A model with its optimizer, and its controller where it has gates."""

    def __init__(self, model: nn.Module, gated: bool) -> None:
        self.model = model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.controller = GateController(model, STEPS) if gated else None

    def step(self, batch: dict[str, Any], number: int) -> None:
        """Take one optimizer step, as number ``number`` of the schedule."""
        if self.controller is not None:
            self.controller.begin_step(number)
        self.model(**batch).loss.backward()
        if self.controller is not None:
            self.controller.before_step(number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.controller is not None:
            self.controller.after_step(number)


def runs_of(name: str) -> dict[str, Run]:
    """Return every way to train a random encoder of this shape, by the name of its column."""
    torch.manual_seed(0)
    plain = BertForSequenceClassification(BertConfig(**ENCODERS[name]))
    dense = freeze_(copy.deepcopy(plain), CONFIG)
    gated = gate_(plain, CONFIG)
    gates = GateMap(gated)
    for gate in gates.gates():
        nn.init.normal_(gate.logits)
    gates.project_(REMOVED)
    on_torch = copy.deepcopy(gated)
    for module in on_torch.modules():
        if hasattr(module, "row_gate"):
            module.config = replace(CONFIG, backend="torch")
    masked = copy.deepcopy(gated)
    runs = {"masked": Run(masked, True), "left": Run(gated, True), "torch": Run(on_torch, True)}
    return {"dense": Run(dense, False), **runs}


@torch.no_grad()
def check(runs: dict[str, Run], batch: dict[str, Any]) -> None:
    """Refuse to time a step that computes something else."""
    losses = {}
    for name in ("masked", "left", "torch"):
        run = runs[name]
        assert run.controller is not None
        if name != "masked":
            shrink_(run.controller.map)
        losses[name] = float(run.model.eval()(**batch).loss)
        run.model.train()
    assert max(losses.values()) - min(losses.values()) <= 1e-5 * losses["masked"], losses


def measure(name: str, threads: int, seconds: float) -> list[str]:
    """Return a row of the table: milliseconds of the dense step, the others over it."""
    torch.set_num_threads(threads)
    runs = runs_of(name)
    ids = torch.randint(1000, (STEP_BATCH, STEP_LENGTH))
    batch = {"input_ids": ids, "labels": torch.arange(STEP_BATCH) % 2}
    check(runs, batch)
    # Every step whose number SHRINK_EVERY divides is computed on whole weights.
    steps: dict[str, Callable[[], object]] = {
        column: partial(run.step, batch, SHRINK_EVERY + (column != "masked"))
        for column, run in runs.items()
    }
    time = medians(interleave(steps, seconds))
    mean = (time["masked"] + (SHRINK_EVERY - 1) * time["left"]) / SHRINK_EVERY
    ratios = (time[column] / time["dense"] for column in ("masked", "left", "torch"))
    return [
        name, str(threads), f"{1e3 * time['dense']:.0f} ms", *(f"{r:.2f}" for r in ratios),
        f"**{mean / time['dense']:.2f}**",
    ]  # fmt: skip


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(ENCODERS), default=list(ENCODERS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--clock", choices=list(harness.CLOCKS), default="wall")
    parser.add_argument("--seconds", type=float, default=20.0, help="at least, for each row")
    options = parser.parse_args()
    harness.clock = harness.CLOCKS[options.clock]
    head = [
        "shape", "threads", "dense step", "masked", "on what is left", "the same on PyTorch",
        f"mean, every {SHRINK_EVERY}th masked",
    ]  # fmt: skip
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name in options.models:
        for threads in options.threads:
            print(f"| {' | '.join(measure(name, threads, options.seconds))} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
