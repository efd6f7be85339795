"""The measured ceilings: of the right order, and one line where there is nothing to measure."""

from __future__ import annotations

import pytest
import torch

from finegates import _native
from finegates.ops import _cpu
from finegates.report.ceilings import peak_flops, read_bandwidth


@pytest.mark.skipif(not _native.available(), reason="no native module")
def test_ceilings_of_this_core() -> None:
    if _native.isa() == "generic":
        with pytest.raises(ValueError, match="no measured peak here: level generic"):
            peak_flops(torch.float32, 1)
        return
    fp32, bf16 = peak_flops(torch.float32, 1), peak_flops(torch.bfloat16, 1)
    assert 1e9 < fp32 < 1e12
    wider = 2 if _native.isa() == "avx512bf16" else 1
    assert bf16 == pytest.approx(wider * fp32, rel=0.25)
    small, large = read_bandwidth(1, 1), read_bandwidth(64, 1)
    assert 1e9 < large < 1.2 * small


def test_ceilings_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "_C", None)
    monkeypatch.setattr(_native, "_reason", "extension not built: no compiler")
    for measure in (
        lambda: _cpu.probe_flops(torch.float32),
        lambda: _cpu.probe_read(torch.ones(64, dtype=torch.uint8), 1, 64),
    ):
        with pytest.raises(ValueError, match="here: extension not built: no compiler"):
            measure()
