"""A served pruned model takes the dense one's memory less what was removed, and 5 %."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finegates import _native
from finegates.export import dense_model
from finegates.recipes.shapes import shaped_model
from finegates.report.memory import memory_of
from finegates.report.work import Work

# Enough weight that a second copy of it would be several times the 5 %.
WIDE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "vocab_size": 1000,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not _native.available(), reason="no native module")
@pytest.mark.parametrize(
    ("shape", "layers", "dtype", "work"),
    [
        ("minilm", 6, torch.float32, Work("prefill", 1, 16)),
        ("smollm2", 12, torch.bfloat16, Work("decode", 1, 16)),
    ],
    ids=["encoder", "decoder"],
)
def test_peak_of_the_serving_process(
    shape: str, layers: int, dtype: torch.dtype, work: Work, tmp_path: Path
) -> None:
    heads = {"num_key_value_heads": 4} if shape == "smollm2" else {}
    model = shaped_model(shape, 0.4, dtype, **WIDE, **heads, num_hidden_layers=layers)
    model.save_pretrained(tmp_path / "pruned")
    dense_model(model).save_pretrained(tmp_path / "dense")
    del model
    dense = memory_of("dense", tmp_path / "dense", work)
    pruned = memory_of("pruned", tmp_path / "pruned", work)
    ours = memory_of("optimized", tmp_path / "pruned", work, "--optimize")
    removed = dense.weights - pruned.weights
    allowed = 1.05 * (dense.peak - removed)
    assert removed > 90e6
    assert dense.peak > allowed  # without the removal it would fail
    assert dense.peak - removed + ours.weights > allowed  # and so with a second copy
    assert ours.weights <= 1.05 * pruned.weights
    assert ours.peak <= allowed
