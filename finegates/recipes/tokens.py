"""From texts to token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tasks import TaskSpec


def tokenize(data: Any, tokenizer: Any, task: TaskSpec, max_length: int, config: Any = None) -> Any:
    """Return the data as token ids with ``labels``, truncated and not padded.

    Pad per batch with ``transformers.DataCollatorWithPadding``.

    Args:
        data: a ``datasets.Dataset`` or ``DatasetDict`` of the task.
        tokenizer: a transformers tokenizer.
        task: names the text columns; pairs are truncated at the longer text first.
        max_length: tokens per example, special tokens included.
        config: the model's config; its positions bound ``max_length`` too.

    Raises:
        ValueError: ``max_length`` is below 8 or above what tokenizer and model take.
    """
    limit = min(tokenizer.model_max_length, max_positions(config))
    if not 8 <= max_length <= limit:
        raise ValueError(f"max_length must be between 8 and {limit}, got {max_length}")

    def encode(batch: Mapping[str, list[Any]]) -> Any:
        texts = [batch[column] for column in task.text_columns]
        tokens = tokenizer(*texts, truncation=True, max_length=max_length)
        return {**tokens, "labels": batch["label"]}

    columns = [*task.text_columns, "label"]
    return data.map(encode, batched=True, remove_columns=columns, desc="tokenizing")


def max_positions(config: Any) -> int:
    """Return how many tokens a model takes: a large number where its config doesn't tell."""
    positions: int = getattr(config, "max_position_embeddings", None) or 1 << 30
    # RoBERTa's positions start behind the padding index.
    if "roberta" in (getattr(config, "model_type", None) or ""):
        positions -= (config.pad_token_id or 0) + 1
    return positions
