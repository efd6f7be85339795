"""The only place with sizes: layers, batch sizes, shares removed."""

from __future__ import annotations

import math

# name: (out_features, in_features)
LAYERS = {
    "768x768": (768, 768),
    "3072x768": (3072, 768),
    "768x3072": (768, 3072),
    "1024x4096": (1024, 4096),
    "2048x2048": (2048, 2048),
    "8192x2048": (8192, 2048),
    "2048x8192": (2048, 8192),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512)
QUICK_LAYERS = ("768x768", "3072x768")
QUICK_BATCHES = (1, 8, 32, 128)
DTYPES = ("fp32", "bf16")

REMOVED = 0.40
LEAST_REMOVED = 0.05
SWEEP = [(layer, LEAST_REMOVED) for layer in LAYERS] + [
    (layer, removed)
    for layer in ("768x768", "3072x768")
    for removed in (0.10, 0.20, 0.40, 0.60, 0.80)
]

QUICK_REMOVED = (LEAST_REMOVED, REMOVED)

COMPILED_LAYERS = ("768x768", "2048x2048")
COMPILED_BATCHES = (1, 8, 128)

COLD_LAYERS = ("3072x768", "2048x2048", "8192x2048", "2048x8192")
COLD_REMOVED = (LEAST_REMOVED, REMOVED)
COLD_BYTES = 256 * 2**20  # several times any last-level cache, whose replacement is not exact

DECODE_LAYERS = ("768x768", "2048x2048", "8192x2048")
DECODE_BATCHES = (1, 4)

TINY = (64, 64)


def kept(full: int, removed: float) -> int:
    """Return an odd count near ``full * sqrt(1 - removed)``: half of the share on each side."""
    count = int(full * math.sqrt(1 - removed))
    return max(1, count if count % 2 else count - 1)


# The most that a gated step on a GPU may take over the frozen Linear's, by the layer's model.
GPU_BARS = {"roberta-base": 1.25, "llama-1b": 1.10, "llama-7b": 1.10}

# GPU training and inference: model.layer: (out_features, in_features, bias)
GPU_LAYERS = {
    "roberta-base.qkvo": (768, 768, True),
    "roberta-base.up": (3072, 768, True),
    "roberta-base.down": (768, 3072, True),
    "roberta-large.qkvo": (1024, 1024, True),
    "roberta-large.up": (4096, 1024, True),
    "roberta-large.down": (1024, 4096, True),
    "llama-1b.qo": (2048, 2048, False),
    "llama-1b.up": (8192, 2048, False),
    "llama-1b.down": (2048, 8192, False),
    "llama-7b.qkvo": (4096, 4096, False),
    "llama-7b.up": (11008, 4096, False),
    "llama-7b.down": (4096, 11008, False),
}
GPU_TOKENS = (1024, 2048, 4096, 8192, 16384)
GPU_DECODE = (1, 32)
CLOSED = (0.0, 0.3, 0.6, 0.9)  # of each side's gates, for the weight in order
GPU_TINY = {"tiny": (66, 70, True)}
GPU_TINY_TOKENS = (33,)

# Whole training steps: fields of a BertConfig, sequences a batch, tokens a sequence.
ENCODERS = {
    "MiniLM": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "RoBERTa-base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
}
STEP_BATCH, STEP_LENGTH = 32, 64
SHRINK_EVERY = 10
