"""What was done to a model, written into its own config as plain JSON values.

A transformers model carries a ``config`` that `save_pretrained` writes; the record is stored there
as ``quantization_config``, the key through which transformers finds our loader. Models without a
config carry no record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..config import GateConfig
from ..nn import PrunedLinear

METHOD = "finegates"
RECORD_VERSION = 1


def record_gated(model: nn.Module, config: GateConfig, names: Sequence[str]) -> None:
    """Record that the named Linears carry gates of ``config``."""
    _write(model, {"state": "gated", "gate_config": config.to_dict(), "modules": list(names)})


def record_pruned(model: nn.Module) -> None:
    """Record the shapes of every `PrunedLinear` of the model."""
    modules = {
        name: layer_record(module)
        for name, module in model.named_modules()
        if isinstance(module, PrunedLinear)
    }
    _write(model, {"state": "pruned", "modules": modules})


def layer_record(layer: PrunedLinear) -> dict[str, Any]:
    """Return the constructor arguments of a `PrunedLinear`; None keeps a whole side."""
    n, k = layer.weight.shape
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "kept_rows": None if layer.rows is None else n,
        "kept_columns": None if layer.columns is None else k,
        "bias": layer.bias is not None,
        "activation": layer.activation,
    }


def _write(model: nn.Module, record: dict[str, Any]) -> None:
    config = getattr(model, "config", None)
    if config is not None:
        config.quantization_config = {"quant_method": METHOD, "version": RECORD_VERSION, **record}
