"""Pages of a mapped file leave the process, and are there again when they are read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from finegates.serving.file_pages import FilePages


def resident_file_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux gives the advice")
def test_pages_leave_and_come_back(tmp_path: Path) -> None:
    weight = torch.arange(4 << 20, dtype=torch.float32)  # 16 MB
    save_file({"weight": weight}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        mapped = file.get_slice("weight")[:]
    mapped[:4].zero_()  # a page of our own
    total, before = mapped.double().sum(), resident_file_bytes()
    FilePages().let_go(mapped)
    assert before - resident_file_bytes() > 12 << 20
    assert mapped.double().sum() == total


def test_other_memory_is_left_alone() -> None:
    pages = FilePages()
    for tensor in (torch.ones(4 << 20), torch.ones(0), torch.ones(1)):
        pages.let_go(tensor)
        assert bool(tensor.eq(1).all())
