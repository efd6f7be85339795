"""`optimize_for_cpu` keeps a model what it was; `restore_` gives it back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import finegates.hf  # noqa: F401
from finegates import PrunedLinear, gate_, optimize_for_cpu, restore_
from finegates.serving import PackedLinear
from serving_case import pruned
from tiny_models import build, inputs, logits

FAMILIES = ("bert", "roberta", "distilbert", "llama")


def layers(model: nn.Module) -> dict[str, type]:
    kinds = (nn.Linear, PrunedLinear, PackedLinear)
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_same_logits_and_the_way_back(model_type: str) -> None:
    model = pruned(model_type)
    before, kinds, state = logits(model), layers(model), model.state_dict()
    classes = [type(m) for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    assert optimize_for_cpu(model) is model
    assert set(layers(model).values()) == {PackedLinear}
    torch.testing.assert_close(logits(model), before)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert optimize_for_cpu(model) is model
    assert restore_(model) is model
    assert layers(model) == kinds
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert torch.equal(logits(model), before)
    assert not any("optimize" in name for name in vars(model))


@pytest.mark.parametrize("model_type", ["bert", "llama"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saves_what_the_pruned_model_saves(model_type: str, tied: bool, tmp_path: Path) -> None:
    model = pruned(model_type, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "plain")
    before = logits(optimize_for_cpu(model))
    model.save_pretrained(tmp_path / "optimized")
    for name in ("config.json", "model.safetensors"):
        plain, ours = ((tmp_path / side / name).read_bytes() for side in ("plain", "optimized"))
        assert plain == ours, name
    auto = AutoModelForMaskedLM if model_type == "bert" else AutoModelForCausalLM
    again = optimize_for_cpu(auto.from_pretrained(tmp_path / "optimized"))
    assert torch.equal(logits(again), before)


def test_a_body_alone_saves_its_own_class(tmp_path: Path) -> None:
    body = pruned("llama").model
    body.save_pretrained(tmp_path / "plain")
    optimize_for_cpu(body).save_pretrained(tmp_path / "optimized")
    plain, ours = ((tmp_path / side / "config.json") for side in ("plain", "optimized"))
    assert "LlamaModel" in plain.read_text()
    assert ours.read_bytes() == plain.read_bytes()


def test_int8_rounds_weights() -> None:
    model = pruned("bert", tie_word_embeddings=False)
    before = logits(model)
    after = logits(optimize_for_cpu(model, weight_dtype="int8"))
    assert 0 < (after - before).abs().max() < 0.1 * before.abs().max()
    torch.testing.assert_close(logits(restore_(model)), after)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_int8_saves_what_loads_and_rounds_to_the_same(model_type: str, tmp_path: Path) -> None:
    model = optimize_for_cpu(pruned(model_type), weight_dtype="int8")
    before = logits(model)
    model.save_pretrained(tmp_path)
    auto = AutoModelForMaskedLM if model_type == "bert" else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path)
    again = optimize_for_cpu(loaded, weight_dtype="int8")
    assert all(m.weight_dtype == "int8" for m in again.modules() if isinstance(m, PackedLinear))
    torch.testing.assert_close(logits(again), before)


def test_refuses_to_train_and_recovers() -> None:
    model = optimize_for_cpu(pruned("bert"))
    model(**inputs())  # no gradient is wanted: nothing requires one
    with pytest.raises(RuntimeError, match=r"finegates\.restore_"):
        model.train()
    with pytest.raises(RuntimeError, match=r"call eval\(\)"):
        model(**inputs())  # dropout before the first packed layer would be on
    assert not any(m.training for m in restore_(model).modules())
    assert model.train().training


def test_a_refused_train_refuses_plain_blocks_too() -> None:
    model = optimize_for_cpu(nn.Sequential(nn.Dropout(), nn.Linear(4, 4)))
    before = model(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="can't train"):
        model.train()
    with pytest.raises(RuntimeError, match=r"call eval\(\)"):
        model(torch.ones(1, 4))
    assert torch.equal(model.eval()(torch.ones(1, 4)), before)


def test_restores_gradients_of_parts_optimized_before_the_whole() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.LayerNorm(4))
    optimize_for_cpu(model[0])
    restore_(optimize_for_cpu(model))
    assert all(p.requires_grad for p in (model[0][1].weight, model[1].weight))


def test_generates_the_same_tokens() -> None:
    model = pruned("llama")
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1}
    before = model.generate(**inputs(batch=1), **options)
    assert torch.equal(optimize_for_cpu(model).generate(**inputs(batch=1), **options), before)


def test_leaves_what_cannot_be_packed() -> None:
    model = nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 4), nn.Linear(4, 4))
    hook = model[1].register_forward_hook(lambda *_: None)
    kinds = [type(m) for m in optimize_for_cpu(model)]
    assert kinds == [nn.Linear, nn.Linear, PackedLinear]
    hook.remove()
    assert [type(m) for m in optimize_for_cpu(model)][1] is PackedLinear


def test_a_layer_with_two_names_stays_one() -> None:
    shared = nn.Linear(4, 4)
    model = optimize_for_cpu(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2]
    assert isinstance(model[0], PackedLinear)
    assert restore_(model)[0] is model[2]


def test_errors() -> None:
    with pytest.raises(ValueError, match="weight_dtype must be one of"):
        optimize_for_cpu(nn.Sequential(nn.Linear(2, 2)), weight_dtype="int4")
    with pytest.raises(ValueError, match=r"gated; call prune_\(model\) first"):
        optimize_for_cpu(gate_(build("bert")))
    with pytest.raises(ValueError, match="put it in a container"):
        optimize_for_cpu(nn.Linear(2, 2))
