"""A tiny Llama with its tokenizer, and a text in which words follow each other predictably."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(30)]


def tokenizer() -> Any:
    """Return a tokenizer with one token a word."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def config(**changes: Any) -> LlamaConfig:
    """Return a Llama of two layers with grouped queries and tied embeddings."""
    fields: dict[str, Any] = {
        "vocab_size": len(WORDS) + 3, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "tie_word_embeddings": True, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaConfig(**{**fields, **changes})


def write_model(folder: Path, **changes: Any) -> Path:
    """Save a model with random weights and its tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(config(**changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, documents: int = 60, seed: int = 0) -> Path:
    """Write documents in which a word is mostly followed by the next one."""
    rng = random.Random(seed)
    texts = []
    for _ in range(documents):
        word, text = rng.randrange(30), []
        for _ in range(rng.randint(10, 40)):
            text.append(WORDS[word])
            word = (word + 1) % 30 if rng.random() < 0.9 else rng.randrange(30)
        texts.append(" ".join(text))
    path.write_text("\n<|endoftext|>\n".join(texts) + "\n")
    return path


def words(train_file: Path, output: Path, *more: str) -> list[str]:
    """Return command-line words of a short run; later ones win."""
    return [
        "--train_file", str(train_file), "--output_dir", str(output), "--use_cpu", "True",
        "--max_steps", "10", "--save_steps", "2", "--logging_steps", "1", "--block_size", "16",
        "--validation_blocks", "8", "--per_device_train_batch_size", "4", "--disable_tqdm", "True",
        *more,
    ]  # fmt: skip
