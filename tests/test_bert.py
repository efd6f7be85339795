"""Fused BERT and RoBERTa layers in whole models: same outputs, and what goes the old way."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, pipeline

from finegates import optimize_for_cpu, restore_
from finegates.serving.bert import FusedEncoderLayer
from numerics import assert_models_no_worse
from serving_case import check_threads_serve_as_one_does, pruned
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
    words = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokens = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )
    model = pruned("bert")
    texts = ["w3 [MASK] w5 w6", "[MASK] w8"]
    before, after = (
        pipeline("fill-mask", model=served, tokenizer=tokenizer, batch_size=2)(texts)
        for served in (model, optimize_for_cpu(copy.deepcopy(model)))
    )
    for old, new in zip(before, after, strict=True):
        assert [guess["token"] for guess in new] == [guess["token"] for guess in old]


def test_a_sequence_does_not_see_its_batch() -> None:
    model = optimize_for_cpu(pruned("roberta"))
    together = run(model).logits
    for i, n in enumerate((9, 7, 5)):
        ids = inputs()["input_ids"][i : i + 1, :n]
        alone = run(model, input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.equal(together[i, :n], alone[0])


def test_four_threads_serve_as_one_does() -> None:
    """Mixed shapes, bitwise, and no memory is lost on the way."""
    model = optimize_for_cpu(pruned("bert"))
    generator = torch.Generator().manual_seed(0)
    requests = [
        torch.randint(2, VOCABULARY, (1 + i % 3, 1 + 3 * i % 29), generator=generator)
        for i in range(100)
    ]
    check_threads_serve_as_one_does(
        lambda ids: run(model, input_ids=ids, attention_mask=None).logits, requests
    )


FORK = """
import os, torch
from finegates import optimize_for_cpu
torch.set_num_threads({before})
model = optimize_for_cpu(torch.nn.Sequential(torch.nn.Linear(512, 512)))
x = torch.randn(64, 512)
expected = model(x)
torch.set_num_threads({at_fork})
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(model(x), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(("before", "at_fork"), [(1, 1), (2, 1)])
def test_a_forked_child_serves_with_one_thread(before: int, at_fork: int) -> None:
    """As docs/serving.md says: GNU OpenMP's threads don't survive a fork."""
    code = FORK.format(before=before, at_fork=at_fork)
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
