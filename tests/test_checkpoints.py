"""Which checkpoint of a stage is whole."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finegates.recipes.checkpoints import damage, last_complete


def write(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.ones(100)}, checkpoint / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(100)}, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


def test_the_newest_by_number(tmp_path: Path) -> None:
    assert last_complete(tmp_path / "none") is None
    for step in (20, 100, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoint-new").mkdir()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("trainer_state.json", "trainer_state.json is missing or no JSON"),
        ("model.safetensors", "model.safetensors is not readable"),
        ("optimizer.pt", "optimizer.pt is cut short"),
        ("scheduler.pt", "scheduler.pt is cut short"),
        ("rng_state.pth", "rng_state.pth is cut short"),
    ],
)
@pytest.mark.parametrize("left", [0, 10, 300])
def test_what_a_kill_cut_short_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, reason: str, left: int
) -> None:
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    whole = (newer / name).read_bytes()
    (newer / name).write_bytes(whole[: min(left, len(whole) - 1)])
    with caplog.at_level(logging.WARNING, "finegates"):
        assert last_complete(tmp_path) == older
    assert f"{newer} is skipped: {reason}" in caplog.text
    (newer / name).unlink()
    assert damage(newer, 2) is not None


def test_a_state_of_another_step_is_no_checkpoint(tmp_path: Path) -> None:
    assert damage(write(tmp_path, 4), 5) == "trainer_state.json is not that of step 5"


def test_what_fsdp_writes_is_whole_too(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 3)
    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer.bin")
    assert damage(checkpoint, 3) is None
    (checkpoint / "optimizer.bin").unlink()
    assert damage(checkpoint, 3) == "optimizer.* is missing"
