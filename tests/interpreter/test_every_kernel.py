"""The script that compute-sanitizer watches launches every kernel there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

import every_kernel

KERNELS = Path(__file__).parents[2] / "kernels"


def test_no_kernel_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = set()
    run = interpreter.GridExecutor.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.add(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)
    every_kernel.run("cpu", (torch.float16,))
    source = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    assert launched == set(re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE))
