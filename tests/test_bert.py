"""Fused BERT and RoBERTa layers in whole models: same outputs, and what goes the old way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, pipeline

from finegates import optimize_for_cpu, restore_
from finegates.serving.bert import FusedEncoderLayer
from numerics import assert_models_no_worse
from serving_case import check_threads_serve_as_one_does, pruned, words
from tiny_models import VOCABULARY, build, inputs, logits

FAMILIES = ("bert", "roberta")


def fused_layers(model: nn.Module) -> int:
    return sum(isinstance(m, FusedEncoderLayer) for m in model.modules())


def run(model: PreTrainedModel, **changes: Any) -> Any:
    with torch.no_grad():
        return model(**{**inputs(), **changes})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What `ops.encoder_layer` was called with, by number of arguments."""
    from finegates.serving import bert

    made: list[int] = []
    original = bert.encoder_layer

    def counted(*args: Any) -> Tensor:
        made.append(len(args))
        return original(*args)

    monkeypatch.setattr(bert, "encoder_layer", counted)
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_outputs_are_those_of_transformers(family: str, attention: str, calls: list[int]) -> None:
    model = pruned(family)
    model.set_attn_implementation(attention)
    square = torch.rand(3, 1, 9, 9) < 0.7
    square[..., 0] = True
    cases: list[dict[str, Any]] = [
        {},
        {"attention_mask": None},
        {"attention_mask": square if attention == "sdpa" else square.float() * 3},
        {"output_hidden_states": True},
    ]
    before = [run(model, **case) for case in cases]
    optimize_for_cpu(model)
    assert fused_layers(model) == 2
    for case, expected in zip(cases, before, strict=True):
        torch.testing.assert_close(tuple(run(model, **case).values()), tuple(expected.values()))
    assert len(calls) == 2 * len(cases)


def test_attention_weights_and_autocast_take_the_layers_own_forward(calls: list[int]) -> None:
    model = pruned("bert")
    model.set_attn_implementation("eager")
    before = run(model, output_attentions=True)
    optimize_for_cpu(model)
    after = run(model, output_attentions=True)
    assert len(after.attentions) == 2
    torch.testing.assert_close(after.attentions, before.attentions)
    model.config.output_attentions = True
    assert len(run(model).attentions) == 2
    model.config.output_attentions = False
    with torch.autocast("cpu", torch.bfloat16):
        assert run(model).logits.dtype == torch.bfloat16
    assert not calls
    embeds = torch.randn(1, 4, 24, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient"):
        model(inputs_embeds=embeds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype, calls: list[int]) -> None:
    model = pruned("roberta").to(dtype)
    exact = logits(copy.deepcopy(model).double())
    plain = (logits(model).double() - exact).abs().max()
    assert (logits(optimize_for_cpu(model)).double() - exact).abs().max() <= 2 * plain
    assert len(calls) == (2 if dtype == torch.bfloat16 else 0)
    assert logits(model.float()).dtype == torch.float32  # packed again at the new dtype
    assert (logits(model).double() - exact).abs().max() <= 0.01 * exact.abs().max()


@pytest.mark.parametrize(
    "changes", [{"is_decoder": True}, {"hidden_act": "quick_gelu"}], ids=["decoder", "activation"]
)
def test_other_layers_keep_their_forward(changes: dict[str, Any]) -> None:
    model = build("bert", **changes)
    before = logits(model)
    optimize_for_cpu(model)
    assert fused_layers(model) == 0
    torch.testing.assert_close(logits(model), before)


def test_heads_the_kernel_cannot_hold_stay_plain() -> None:
    model = build("bert", hidden_size=390, num_attention_heads=1)
    before, exact = logits(model), logits(copy.deepcopy(model).double())
    assert fused_layers(optimize_for_cpu(model)) == 0
    assert_models_no_worse([logits(model)], [before], [exact])


def test_follows_replaced_modules(calls: list[int]) -> None:
    model = optimize_for_cpu(pruned("bert"))
    before = logits(model)
    layer = model.bert.encoder.layer[0]
    layer.output.LayerNorm = nn.LayerNorm(24).requires_grad_(False)
    calls.clear()
    after = logits(model)
    assert len(calls) == 2
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, logits(restore_(copy.deepcopy(model))))
    inner = layer.intermediate.dense.out_features
    layer.intermediate.dense = nn.Linear(24, inner).requires_grad_(False)
    calls.clear()
    torch.testing.assert_close(logits(model), logits(restore_(copy.deepcopy(model))))
    assert len(calls) == 1


def test_norms_of_another_dtype_take_the_layers_own_forward(calls: list[int]) -> None:
    layer = optimize_for_cpu(pruned("bert")).bert.encoder.layer[1]
    layer.output.LayerNorm.bfloat16()
    with torch.no_grad(), pytest.raises(RuntimeError, match="mixed dtype"):  # torch's own
        layer(torch.randn(1, 3, 24))
    assert not calls


def test_a_layer_with_hooks_inside_keeps_its_forward() -> None:
    model = pruned("bert")
    seen: list[int] = []
    model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: seen.append(1))
    assert fused_layers(optimize_for_cpu(model)) == 1
    logits(model)
    assert seen == [1]


def test_copies_and_compiles() -> None:
    model = optimize_for_cpu(pruned("bert"))
    before = logits(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(copied), before)
    compiled = torch.compile(copied, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs()).logits, before)
    assert fused_layers(copied) == 2


def test_pipelines() -> None:
    model = pruned("bert")
    texts = ["w3 [MASK] w5 w6", "[MASK] w8"]
    before, after = (
        pipeline("fill-mask", model=served, tokenizer=words(), batch_size=2)(texts)
        for served in (model, optimize_for_cpu(copy.deepcopy(model)))
    )
    for old, new in zip(before, after, strict=True):
        assert [guess["token"] for guess in new] == [guess["token"] for guess in old]


def test_text_classification_pipeline(calls: list[int]) -> None:
    body = pruned("roberta")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        build("roberta", num_labels=5).config
    ).eval()
    model.roberta = copy.deepcopy(body.roberta)
    texts = ["w3 w4 w5 w6", "w8", "w9 w10"]
    options = {"tokenizer": words(model_max_length=30), "batch_size": 2, "top_k": None}
    before, after = (
        pipeline("text-classification", model=served, **options)(texts)
        for served in (model, optimize_for_cpu(copy.deepcopy(model)))
    )
    assert len(calls) == 2 * 2
    for old, new in zip(before, after, strict=True):
        assert [guess["label"] for guess in new] == [guess["label"] for guess in old]
        scores = [[guess["score"] for guess in guesses] for guesses in (new, old)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)
        assert len(set(scores[0])) == 5


def test_a_sequence_does_not_see_its_batch() -> None:
    model = optimize_for_cpu(pruned("roberta"))
    together = run(model).logits
    for i, n in enumerate((9, 7, 5)):
        ids = inputs()["input_ids"][i : i + 1, :n]
        alone = run(model, input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.equal(together[i, :n], alone[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_four_threads_serve_as_one_does(dtype: torch.dtype) -> None:
    """Mixed shapes, bitwise, and no memory is lost on the way."""
    model = optimize_for_cpu(pruned("bert").to(dtype))
    generator = torch.Generator().manual_seed(0)
    requests = [
        torch.randint(2, VOCABULARY, (1 + i % 3, 1 + 3 * i % 29), generator=generator)
        for i in range(100)
    ]
    check_threads_serve_as_one_does(
        lambda ids: run(model, input_ids=ids, attention_mask=None).logits, requests
    )
