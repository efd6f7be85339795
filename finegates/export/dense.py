"""A pruned model in the shapes of its architecture, zeros in place of what was removed."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..nn import FusedGatedLinear, PrunedLinear
from ..serving import restore_


def dense_model(model: Any) -> Any:
    """Return a copy of a pruned transformers model in which every `PrunedLinear` is an `nn.Linear`.

    The copy computes the same function in the shapes that the model's config says, so it needs no
    finegates to load: w[rows][:, columns] is the compact weight and the rest is 0. MLP features
    that became compact take the first places. An optimised model is restored first.

    Args:
        model: a `PreTrainedModel`, pruned, optimised or plain; it is not changed.

    Raises:
        TypeError: it has no transformers config.
        ValueError: it has gated layers, or its layers don't fit its config.
    """
    full = _skeleton(model)

    def dense(name: str, layer: PrunedLinear) -> nn.Linear:
        try:
            shape: Any = full.get_submodule(name).weight.shape
        except AttributeError:
            raise ValueError(f"model's config knows no module {name!r}") from None
        linear = layer.to_linear()
        n, k = linear.weight.shape
        if n > shape[0] or k > shape[1]:
            raise ValueError(f"{name} must fit the config's {tuple(shape)}, got {(n, k)}")
        linear.out_features, linear.in_features = shape
        linear.weight.data = F.pad(linear.weight.data, (0, shape[1] - k, 0, shape[0] - n))
        if linear.bias is not None:
            linear.bias.data = F.pad(linear.bias.data, (0, shape[0] - n))
        return linear

    plain = replaced(model, dense)
    plain.config = plain_config(model)
    return plain


def export_dense(model: Any, folder: str | os.PathLike[str]) -> None:
    """Save `dense_model` with ``save_pretrained``, for transformers, llama.cpp, vLLM and the like.

    Raises:
        TypeError, ValueError: as `dense_model` does.
    """
    dense_model(model).save_pretrained(folder)


@torch.no_grad()
def replaced(model: Any, replacement: Callable[[str, PrunedLinear], nn.Module]) -> Any:
    """Return a restored copy of the model with another module for every `PrunedLinear`.

    Raises:
        ValueError: the model has gated layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, FusedGatedLinear):
            raise ValueError(f"{name or 'model'} is gated; call prune_(model) first")
    plain = restore_(copy.deepcopy(model))
    pruned = [(n, m) for n, m in plain.named_modules() if isinstance(m, PrunedLinear)]
    for name, layer in pruned:
        plain.set_submodule(name, replacement(name, layer))
    return plain


def _skeleton(model: Any) -> nn.Module:
    """Build the model's class from its config without memory, for the shapes."""
    with torch.device("meta"):
        built: nn.Module = type(model)(plain_config(model))
    return built


def plain_config(model: Any) -> Any:
    """Return a copy of the config without the record of what was removed."""
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if not hasattr(config, "to_dict"):
        raise TypeError(f"model must have a transformers config, got {type(model).__name__}")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
