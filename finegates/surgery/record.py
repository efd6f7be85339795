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
from ..gates import Gate
from ..nn import PrunedLinear

METHOD = "finegates"
RECORD_VERSION = 1


def record_gated(model: nn.Module, config: GateConfig, names: Sequence[str]) -> None:
    """Record that the named Linears carry gates of ``config``; the names become its patterns."""
    for alias, owner in tied_logits(model).items():
        gate = model.get_submodule(alias.removesuffix(".logits"))
        # safetensors refuses aliases: save_pretrained drops the keys that a module declares here.
        gate._tied_weights_keys = {"logits": owner}  # type: ignore[assignment]
    gate_config = {**config.to_dict(), "modules": list(names)}
    _write(model, {"state": "gated", "gate_config": gate_config, "modules": _pruned_layers(model)})


def record_pruned(model: nn.Module) -> None:
    """Record the shapes of every `PrunedLinear` of the model."""
    _write(model, {"state": "pruned", "modules": _pruned_layers(model)})


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


def tied_logits(model: nn.Module) -> dict[str, str]:
    """Return for every repeated name of shared gate logits the first name, in model order."""
    owners: dict[int, str] = {}
    ties = {}
    for name, module in model.named_modules():
        if isinstance(module, Gate):
            key = f"{name}.logits"
            owner = owners.setdefault(id(module.logits), key)
            if owner != key:
                ties[key] = owner
    return ties


def _pruned_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: layer_record(module)
        for name, module in model.named_modules()
        if isinstance(module, PrunedLinear)
    }


def _write(model: nn.Module, record: dict[str, Any]) -> None:
    config: Any = getattr(model, "config", None)
    # Other models keep other things under that name.
    if hasattr(config, "to_dict"):
        config.quantization_config = {"quant_method": METHOD, "version": RECORD_VERSION, **record}
