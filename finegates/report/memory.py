"""Memory of a process that serves a saved model, measured from inside a fresh one."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch

from .work import Work, serve


@dataclass(frozen=True)
class Memory:
    """Bytes of a serving process.

    Args:
        model: which form of the model.
        weights: parameters and buffers, each once.
        resident: of the process after loading and a few requests.
        peak: the most that was ever resident, loading included.
    """

    model: str
    weights: int
    resident: int
    peak: int


def memory_of(model: str, folder: str | os.PathLike[str], work: Work, *options: str) -> Memory:
    """Serve a saved model in a process of its own and return what it needed.

    Args:
        model: the name of the result.
        folder: what ``save_pretrained`` wrote.
        work: a request to serve three times.
        options: of ``python -m finegates.recipes.served_memory``.

    Raises:
        ValueError: the process failed, or this system has no /proc.
    """
    command = [sys.executable, "-m", "finegates.recipes.served_memory", os.fspath(folder)]
    command += ["--work", work.kind, str(work.batch), str(work.length), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"the process that serves {os.fspath(folder)!r} failed: {lines[-1]}")
    return Memory(model, **json.loads(done.stdout))


@torch.inference_mode()
def serve_and_measure(model: Any, work: Work) -> dict[str, int]:
    """Serve three requests and return `Memory`'s fields of this process.

    Raises:
        OSError: this system has no /proc.
    """
    call = serve(model, work)
    for _ in range(3):
        call()
    gc.collect()
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    weights = sum(t.numel() * t.element_size() for t in tensors.values())
    return {"weights": weights, "resident": _status("VmRSS"), "peak": _status("VmHWM")}


def _status(field: str) -> int:
    # Not getrusage: its ru_maxrss starts with that of the process that forked this one.
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
