"""A tiny BERT with its tokenizer, and a tiny task in SST-2's layout, as folders."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

WORDS = [f"word{i}" for i in range(40)]


def write_model(folder: Path) -> None:
    """Write a random BERT of two layers whose vocabulary is `WORDS`."""
    folder.mkdir()
    vocabulary = {
        word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    }
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)


def write_task(folder: Path) -> None:
    """Write a training and a development set in SST-2's layout, 128 and 64 sentences."""
    folder.mkdir()
    for split, rows in (("train", 128), ("dev", 64)):
        write_split(folder / f"{split}.tsv", rows)


def write_split(path: Path, rows: int) -> None:
    """Write sentences of random words, positive where the first word sorts before the last."""
    rng = random.Random(rows)
    lines = ["sentence\tlabel"]
    for _ in range(rows):
        words = rng.choices(WORDS, k=rng.randint(3, 9))
        lines.append(f"{' '.join(words)}\t{int(words[0] < words[-1])}")
    path.write_text("\n".join(lines) + "\n")
