"""Fused Llama bodies to test, and what they are asked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from finegates import optimize_for_cpu
from finegates.ops import _cpu_blocks
from finegates.serving import llama
from finegates.serving.fused import FusedBlock
from serving_case import pruned
from tiny_models import VOCABULARY


def build(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """Return a tiny pruned model of the family."""
    if family == "mistral":
        changes = {"sliding_window": None, **changes}
    return pruned(family, **changes)


def fused(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Return an optimized copy."""
    optimized = optimize_for_cpu(copy.deepcopy(model), **options)
    assert isinstance(optimized.model, FusedBlock)
    return optimized


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of new tokens of each native call."""
    made: list[int] = []
    original = _cpu_blocks.decoder

    def counted(x: Tensor, *args: Any) -> Tensor:
        made.append(x.shape[1])
        return original(x, *args)

    monkeypatch.setattr(llama._cpu_blocks, "decoder", counted)
    return made


def prompt(batch: int = 1, length: int = 7, pads: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Return token ids and a mask; ``pads`` tokens of padding on the left of each sequence."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for i, pad in enumerate(pads):
        ids[i, :pad], mask[i, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, tokens: int = 30, **options: Any) -> Tensor:
    """Return the prompt and as many new tokens, greedily."""
    options = {**prompt(), "do_sample": False, **options}
    result: Tensor = model.generate(max_new_tokens=tokens, min_new_tokens=tokens, **options)
    return result
