"""Pruned models to optimize."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from finegates import GateConfig, gate_, prune_
from tiny_models import build, scatter_gates_


def pruned(model_type: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny model with 30 % of its units closed at random and removed."""
    # An architecture that couples nothing needs patterns.
    config = GateConfig(modules=("*_lin", "*.lin1")) if model_type == "distilbert" else None
    model = gate_(build(model_type, **changes), config)
    scatter_gates_(model, 0.7)
    return prune_(model).eval()
