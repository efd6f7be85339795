"""The script that compute-sanitizer watches launches every kernel there is."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import every_kernel
from launches import Launches

KERNELS = Path(__file__).parents[2] / "kernels"


def test_no_kernel_is_left_out(launches: Launches) -> None:
    every_kernel.run("cpu", (torch.float16,))
    source = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    kernels = set(re.findall(r"^def _(\w+)_kernel\(", source, re.MULTILINE))
    assert {name for name, _ in launches.kernels} == kernels
