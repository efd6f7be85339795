"""Gates-only checkpoints: what `gate_` trains, in kilobytes, beside an untouched base model.

A folder holds ``gates.safetensors`` and ``gate_config.json`` (`GateConfig.to_dict` with the gated
modules' names as patterns).
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..config import GateConfig
from ..gates import Gate
from ..nn import FusedGatedLinear
from ..surgery import gate_
from .quantizer import gate_config_from

WEIGHTS_NAME = "gates.safetensors"
CONFIG_NAME = "gate_config.json"

# The fields that turn logits into gate values and factors into a LoRA: with others the same tensors
# mean something else.
_MEANING = ("distribution", "offset", "beta", "gamma", "zeta", "lora_rank", "lora_alpha")

Model = TypeVar("Model", bound=nn.Module)


def save_gates(
    model: nn.Module, folder: str | os.PathLike[str], *, logits_only: bool = False
) -> None:
    """Write the gates and the other trainable parameters of a gated model to a folder.

    Tied gates are written once, under their first name. Each file appears complete or not at all:
    both are written under temporary names first, then renamed.

    Args:
        model: a model that `gate_` has gated.
        folder: made if it doesn't exist; its two files are replaced.
        logits_only: leave out the other parameters that require a gradient (biases, LoRA,
            head).

    Raises:
        ValueError: the model has no gated layer, or its layers have different configs.
    """
    layers = _gated_layers(model)
    if not layers:
        raise ValueError("model has no FusedGatedLinear; call gate_(model, config) first")
    configs = {layer.config for layer in layers.values()}
    if len(configs) > 1:
        raise ValueError(f"model must be gated with one GateConfig, got {len(configs)}")
    logits = _logits(model)
    tensors = {
        name: parameter.detach().cpu().contiguous().clone()
        for name, parameter in model.named_parameters()
        if name in logits or parameter.requires_grad and not logits_only
    }
    config = {**configs.pop().to_dict(), "modules": list(layers)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_together(
        {
            folder / WEIGHTS_NAME: save(tensors, metadata={"format": "pt"}),
            folder / CONFIG_NAME: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        }
    )


def load_gates(model: Model, folder: str | os.PathLike[str]) -> Model:
    """Load what `save_gates` wrote, in place; a plain base model is gated first.

    Everything is checked before the model is touched. Stored values are cast to the model's dtype,
    logits stay fp32.

    Args:
        model: the base model, plain or gated alike.
        folder: what `save_gates` wrote.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or its modules, names or shapes don't fit the model; the
            message names the file and the value.
    """
    config_path, weights_path = Path(folder) / CONFIG_NAME, Path(folder) / WEIGHTS_NAME
    config = _read_config(config_path)
    tensors = _read_tensors(weights_path)
    layers = _gated_layers(model)
    if layers:
        _check_same_meaning(config_path, config, next(iter(layers.values())).config)
        _check_tensors(weights_path, tensors, model)
    else:
        try:
            gated = gate_(_skeleton(model), config)
        except ValueError as error:
            raise ValueError(f"{config_path}: {error}") from error
        _check_tensors(weights_path, tensors, gated)
        gate_(model, config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return model


def _gated_layers(model: nn.Module) -> dict[str, FusedGatedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FusedGatedLinear)}


def _logits(model: nn.Module) -> dict[str, Tensor]:
    """Return the distinct logits by their first name."""
    gates = {id(module.logits) for module in model.modules() if isinstance(module, Gate)}
    return {name: p for name, p in model.named_parameters() if id(p) in gates}


def _write_together(files: dict[Path, bytes]) -> None:
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, data in files.items():
            temporary[path].write_bytes(data)
        for path, written in temporary.items():
            os.replace(written, path)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)


def _read_config(path: Path) -> GateConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    return gate_config_from(values, str(path))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def _check_same_meaning(path: Path, stored: GateConfig, current: GateConfig) -> None:
    for field in _MEANING:
        theirs, ours = getattr(stored, field), getattr(current, field)
        if theirs != ours:
            raise ValueError(f"{path}: {field} must be {ours!r}, as in the model, got {theirs!r}")


def _check_tensors(path: Path, tensors: dict[str, Tensor], model: nn.Module) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name not in parameters:
            raise ValueError(f"{path}: {name!r} is no parameter of {type(model).__name__}")
        shape, got = tuple(parameters[name].shape), tuple(tensor.shape)
        if got != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {name} must be a float tensor of shape {shape}, got {tensor.dtype} of "
                f"shape {got}"
            )
        if tensor.isnan().any():
            raise ValueError(f"{path}: {name} holds NaN")
    stored = {id(parameters[name]) for name in tensors}
    for name, logits in _logits(model).items():
        if id(logits) not in stored:
            raise ValueError(f"{path}: {name} is missing")


def _skeleton(model: Model) -> Model:
    """Copy a model without its memory: parameters and buffers on meta."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    memo.update((id(buffer), torch.empty_like(buffer, device="meta")) for buffer in model.buffers())
    return copy.deepcopy(model, memo)
