"""Models in the shapes of well-known ones with random weights: times need no download."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..surgery import GateMap, gate_, prune_

_LLAMA = {"tie_word_embeddings": True, "max_position_embeddings": 2048, "rope_theta": 100000.0}
# name: (class, config class, config)
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "roberta-base": (
        "RobertaModel", "RobertaConfig", {"vocab_size": 50265, "max_position_embeddings": 514}
    ),
    "roberta-large": (
        "RobertaModel",
        "RobertaConfig",
        {
            "vocab_size": 50265, "max_position_embeddings": 514, "hidden_size": 1024,
            "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        },
    ),
    "minilm": (
        "BertForSequenceClassification",
        "BertConfig",
        {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    ),
    "smollm2": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            **_LLAMA, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        },
    ),
    "llama-1b": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            **_LLAMA, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        },
    ),
}  # fmt: skip


def shaped_model(
    name: str, sparsity: float, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """Return a random model of a known shape with random rows and columns removed.

    Args:
        name: a key of `SHAPES`.
        sparsity: fraction of the gated weights that is removed; 0 removes nothing.
        dtype: of the weights.
        changes: fields of the config.

    Raises:
        ValueError: the name is unknown, or the sparsity outside [0, 1).
    """
    if name not in SHAPES:
        raise ValueError(f"shape must be one of {tuple(SHAPES)}, got {name!r}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    import transformers

    kind, config_kind, fields = SHAPES[name]
    config = getattr(transformers, config_kind)(**{**fields, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    return prune_randomly_(model, sparsity).to(dtype)


def prune_randomly_(model: Any, sparsity: float) -> Any:
    """Remove a share of the gated weights by random logits, in place; returns the model."""
    if not sparsity:
        return model
    gates = GateMap(gate_(model))
    for gate in gates.gates():
        nn.init.normal_(gate.logits)
    gates.project_(sparsity)
    return prune_(model).requires_grad_(False)
