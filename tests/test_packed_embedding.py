"""An input embedding tied to a packed output layer: one copy, and what the model stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from finegates import optimize_for_cpu, restore_
from finegates.serving.packed_embedding import PackedEmbedding
from serving_case import pruned
from tiny_models import VOCABULARY, inputs, logits


def tied(model_type: str = "llama", **changes: Any) -> Any:
    return pruned(model_type, tie_word_embeddings=True, **changes)


def embedding(model: Any) -> Any:
    return model.get_input_embeddings()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_one_copy_that_serves_both(model_type: str, dtype: torch.dtype) -> None:
    model = tied(model_type).to(dtype)
    rows, ids = embedding(model).weight.detach().clone(), inputs()["input_ids"]
    plain = copy.deepcopy(model)
    optimize_for_cpu(model)
    assert type(embedding(model)) is PackedEmbedding
    assert isinstance(embedding(model), nn.Embedding)
    assert torch.equal(embedding(model)(ids), rows[ids])
    assert torch.equal(embedding(model).weight, rows)
    assert not any(p.shape == rows.shape for p in model.parameters())
    with pytest.raises(IndexError):
        embedding(model)(torch.tensor([VOCABULARY]))
    restored = restore_(model)
    assert type(embedding(restored)) is nn.Embedding
    assert embedding(restored).weight is restored.get_output_embeddings().weight
    assert torch.equal(embedding(restored).weight, rows)
    assert torch.equal(logits(restored), logits(plain))
    assert embedding(restored).padding_idx == embedding(plain).padding_idx
    assert restored.train().training


def test_int8_rounds_the_rows() -> None:
    model = tied()
    rows = embedding(model).weight.detach().clone()
    found = embedding(optimize_for_cpu(model, weight_dtype="int8"))(torch.arange(VOCABULARY))
    error = (found - rows).abs().amax(1)
    assert bool((error <= 0.5001 * rows.abs().amax(1) / 127).all())
    assert torch.equal(found, embedding(restore_(model)).weight)


def test_state_dicts() -> None:
    """Both entries are one tensor, as of any tied model, and either name loads."""
    model, other = tied(), tied(seed=1)
    expected, names = logits(other), ["model.embed_tokens.weight", "lm_head.weight"]
    state, ours = other.state_dict(), optimize_for_cpu(model).state_dict()
    assert len({ours[name].data_ptr() for name in names}) == 1
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        torch.testing.assert_close(logits(model), expected)
    weight = torch.randn(state[names[0]].shape)
    embedding(model).load_state_dict({"weight": weight})
    assert torch.equal(embedding(model).weight, weight)
    assert torch.equal(model.lm_head.weight, weight)


def test_copies_are_independent() -> None:
    model = optimize_for_cpu(tied())
    before, state = logits(model), model.state_dict()  # holds what the head has lent
    copied = copy.deepcopy(model)
    copied.load_state_dict(tied(seed=1).state_dict())
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(copied), before)
    assert embedding(restore_(copied)).weight is copied.lm_head.weight
    assert embedding(copied).weight.data_ptr() != state["lm_head.weight"].data_ptr()


def test_follows_dtypes() -> None:
    model = optimize_for_cpu(tied())
    assert embedding(model.bfloat16())(torch.tensor([3])).dtype == torch.bfloat16
    model = optimize_for_cpu(tied())
    body = model.model.bfloat16()  # without the head
    assert embedding(body)(torch.tensor([3])).dtype == torch.bfloat16
    assert model.lm_head.dtype == torch.float32


def test_compiles() -> None:
    model = optimize_for_cpu(tied("bert"))
    before = logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs()).logits, before)


@pytest.mark.parametrize("case", ["max_norm", "three"])
def test_other_ties_keep_their_weight(case: str) -> None:
    model = nn.ModuleDict({"e": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    if case == "max_norm":  # changes the weight when it reads it
        model["e"].max_norm = 1.0
    else:
        model["third"] = nn.Embedding(9, 4)
        model["third"].weight = model["e"].weight
    model["head"].weight = model["e"].weight
    weight = model["e"].weight
    optimize_for_cpu(model)
    assert type(model["e"]) is nn.Embedding
    assert model.state_dict()["head.weight"].data_ptr() == weight.data_ptr()
