"""Tokens and scores."""

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from finegates.recipes.glue import GLUE
from finegates.recipes.movie_reviews import MOVIE_REVIEWS
from finegates.recipes.scores import scores
from finegates.recipes.tokens import tokenize


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "b", "c"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )


def test_tokenize_truncates_and_leaves_padding_to_the_batch(tokenizer):
    rows = {"sentence": ["a b", "c " * 20], "label": [0, 1]}
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    tokens = tokenize(splits, tokenizer, MOVIE_REVIEWS, 12)["train"]
    assert [len(ids) for ids in tokens["input_ids"]] == [2, 12]
    assert "sentence" not in tokens.column_names
    batch = DataCollatorWithPadding(tokenizer)([tokens[0], tokens[1]])
    assert batch["input_ids"].shape == (2, 12)
    assert batch["labels"].tolist() == [0, 1]


def test_tokenize_reads_pairs(tokenizer):
    rows = datasets.Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b c"], "label": [1]})
    tokens = tokenize(rows, tokenizer, GLUE["rte"], 8)
    assert tokens[0]["input_ids"] == [2, 3, 4]


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (None, 32),
        (BertConfig(max_position_embeddings=16), 16),
        (RobertaConfig(max_position_embeddings=18, pad_token_id=1), 16),
    ],
    ids=["tokenizer", "bert", "roberta"],
)
def test_max_length_is_bounded(tokenizer, config, limit):
    rows = datasets.Dataset.from_dict({"sentence": ["a"], "label": [1]})
    tokenize(rows, tokenizer, MOVIE_REVIEWS, limit, config)
    for wrong in (limit + 1, 0):
        with pytest.raises(ValueError, match=f"max_length must be between 8 and {limit}, got"):
            tokenize(rows, tokenizer, MOVIE_REVIEWS, wrong, config)


def test_scores_are_the_benchmarks_own():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    labels = np.array([0, 1, 0, 1])
    assert scores(GLUE["mrpc"], logits, labels) == {"accuracy": 0.5, "f1": 0.5}
    assert scores(GLUE["cola"], logits, labels) == {"matthews": 0.0}
    values = np.array([[1.0], [2.0], [4.0]])
    found = scores(GLUE["stsb"], values, [0.0, 1.0, 2.0])
    assert found == pytest.approx({"pearson": 0.981981, "spearman": 1.0}, abs=1e-6)
    assert {name: task.metrics for name, task in GLUE.items()} == {
        "cola": ("matthews",),
        "sst2": ("accuracy",),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "stsb": ("pearson", "spearman"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
    }


def test_constant_predictions_have_no_correlation():
    found = scores(GLUE["stsb"], np.ones((4, 1)), [0.0, 1.0, 2.0, 3.0])
    assert np.isnan(list(found.values())).tolist() == [True, True]
