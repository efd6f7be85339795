"""The last checkpoint of a stage that was written whole: a kill may have cut the newest short."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

_log = logging.getLogger("finegates")
_NAME = re.compile(r"checkpoint-(\d+)")
# What transformers' Trainer reads to go on as if it had not stopped; torch writes zip archives,
# whose directory comes last. Under FSDP the optimizer is a .bin.
_ARCHIVES = ("optimizer.*", "scheduler.pt", "rng_state*.pth")


def last_complete(folder: Path) -> Path | None:
    """Return the newest whole checkpoint below a folder, None without one; log what is skipped."""
    found = [(int(m[1]), path) for path in folder.glob("*") if (m := _NAME.fullmatch(path.name))]
    for step, path in sorted(found, reverse=True):
        reason = damage(path, step)
        if reason is None:
            return path
        _log.warning("%s is skipped: %s", path, reason)
    return None


def damage(checkpoint: Path, step: int) -> str | None:
    """Return what is missing or cut short in a Trainer's checkpoint, None when it is whole."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json is missing or no JSON"
    if not isinstance(state, dict) or state.get("global_step") != step:
        return f"trainer_state.json is not that of step {step}"
    weights = list(checkpoint.glob("*.safetensors"))
    if not weights:
        return "it has no safetensors"
    for path in weights:
        try:
            with safe_open(path, framework="pt"):  # reads the header, compares sizes
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name} is not readable ({error})"
    for pattern in _ARCHIVES:
        archives = list(checkpoint.glob(pattern))
        if not archives:
            return f"{pattern} is missing"
        for path in archives:
            if not zipfile.is_zipfile(path):
                return f"{path.name} is cut short"
    return None
