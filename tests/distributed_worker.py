"""One of the processes that tests/test_distributed.py starts; alone it is the reference.

    python distributed_worker.py FOLDER COMMAND-LINE WORDS...

runs a job of the command line, then trains a small sharded model, and writes both runs' logits.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from finegates import GateConfig, GateMap, gate_, report
from finegates.cli import main
from finegates.surgery import GateController, replicate_
from tiny_models import VOCABULARY, build

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
STEPS = 8


def logits_of(gates: GateMap) -> dict[str, torch.Tensor]:
    return {str(i): gate.logits.detach().clone() for i, gate in enumerate(gates.gates())}


def run_job(folder: Path, words: list[str]) -> None:
    """Run a job; note the logits that its controller ends with on this process."""
    finish = GateController.finish

    def noting(self: GateController) -> Any:
        removal = finish(self)
        save_file(logits_of(self.map), folder / f"job-{RANK}-of-{WORLD}.safetensors")
        return removal

    GateController.finish = noting  # type: ignore[method-assign]
    report.latency = partial(report.latency, seconds=0.01, min_rounds=2)
    if main(words) != 0:
        raise SystemExit(1)


def run_sharded(folder: Path) -> None:
    """Train with FSDP in several processes, plainly in one; each has its share of the batch."""
    torch.manual_seed(0)
    model = gate_(build("llama"), GateConfig(trainable=("*norm.weight",))).train()
    if WORLD > 1:
        logits = replicate_(model)
        for layer in model.model.layers:
            fully_shard(layer, ignored_params=logits)
        fully_shard(model, ignored_params=logits)
    controller = GateController(model, STEPS)
    controller.start()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for step in range(STEPS):
        for part in range(2):  # two backward passes a step
            generator = torch.Generator().manual_seed(2 * step + part)
            ids = torch.randint(2, VOCABULARY, (4, 9), generator=generator)
            share = ids.chunk(WORLD)[RANK]
            loss = model(input_ids=share, labels=share).loss / 2
            loss.backward()
            mean = loss.detach() / WORLD
            if WORLD > 1:
                dist.all_reduce(mean)
            losses.append(mean)
        controller.before_step(step)
        optimizer.step()
        optimizer.zero_grad()
        controller.after_step(step)
    controller.finish()
    found = {**logits_of(controller.map), "losses": torch.stack(losses)}
    save_file(found, folder / f"sharded-{RANK}-of-{WORLD}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_job(Path(sys.argv[1]), sys.argv[2:])
    run_sharded(Path(sys.argv[1]))
    if WORLD > 1:
        dist.destroy_process_group()
