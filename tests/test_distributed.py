"""Two processes give the gates of one: DDP through a job, FSDP around the controller."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import finegates.hf  # noqa: F401 - lets from_pretrained load what was pruned
from tiny_text import words, write_model, write_text

TESTS = Path(__file__).parent


def start(
    world: int, rank: int, port: int, folder: Path, words: list[str]
) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    if world > 1:
        environment |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, str(TESTS / "distributed_worker.py"), str(folder), *words],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same run in one process and in two, at equal global batches."""
    root = tmp_path_factory.mktemp("distributed")
    model, text = write_model(root / "llama"), write_text(root / "train.txt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for world, batch in ((1, 8), (2, 4)):
        more = ("--model", str(model), "--new_tokens", "0", "--sparsity", "0.3")
        more += ("--per_device_train_batch_size", str(batch))
        more += ("--ddp_backend", "gloo") if world > 1 else ()
        arguments = ["posttrain", *words(text, root / f"run-{world}", *more)]
        processes += [start(world, rank, port, root, arguments) for rank in range(world)]
    for process in processes:
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said[-3000:]
    return root


def load(root: Path, name: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    return load_file(root / f"{name}-{rank}-of-{world}.safetensors")


@pytest.mark.parametrize("name", ["job", "sharded"])
def test_every_process_has_the_gates_of_one(runs: Path, name: str) -> None:
    alone, first, second = (load(runs, name, *which) for which in ((0, 1), (0, 2), (1, 2)))
    assert first.keys() == second.keys() == alone.keys()
    for key in first:
        assert torch.equal(first[key], second[key])
        if key != "losses":
            assert torch.equal(first[key] > 0, alone[key] > 0)
        torch.testing.assert_close(first[key], alone[key], rtol=1e-3, atol=1e-3)
    assert any((value <= 0).any() for value in first.values())


def test_losses_are_those_of_one_process(runs: Path) -> None:
    logs = [
        json.loads((runs / f"run-{world}" / "gated" / "history.json").read_text())["log_history"]
        for world in (1, 2)
    ]
    for key in ("loss", "eval_loss"):
        alone, two = ([entry[key] for entry in log if key in entry] for log in logs)
        assert len(alone) == 10
        assert two == pytest.approx(alone, rel=1e-4)


def test_the_first_process_writes_for_all(runs: Path) -> None:
    folders = [runs / f"run-{world}" for world in (1, 2)]
    files = [{path.relative_to(f) for path in f.rglob("*.*") if path.is_file()} for f in folders]
    extra = {path for path in files[1] - files[0] if path.name.startswith("rng_state_")}
    assert files[1] - files[0] == extra
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder / "pruned").state_dict() for folder in folders
    )
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-3, atol=1e-3)
