"""`gate_`: replace the selected Linears of a model by gated ones; `freeze_`: only its freezing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from ..config import GateConfig
from ..gates import Gate
from ..nn import FusedGatedLinear, LoRA
from .budget import price_of
from .couplings import Architecture, Side, architecture_of
from .record import record_gated

Model = TypeVar("Model", bound=nn.Module)


def gate_(model: Model, config: GateConfig | None = None) -> Model:
    """Gate the selected Linears in place, tie their gates, and freeze what the method freezes.

    Trainable afterwards: the gates' logits, the LoRA inside them (``lora_rank``), the biases of
    gated layers (``train_bias``), their weights only with ``train_weight``, and parameters that
    match ``trainable`` (the head).

    Args:
        model: any module; BERT-, RoBERTa- and Llama-like blocks are found by their names.
        config: what to gate and how; None takes `GateConfig`'s defaults.

    Returns:
        The same model.

    Raises:
        ValueError: the model is gated already or holds peft's adapters, a pattern matches no
            Linear, the budget counts latency without costs of every gated shape,
            ``modules`` is None for a model whose architecture is unknown, or a selected
            Linear lies in an `nn.TransformerEncoderLayer`, which reads its Linears' weights past
            their gates.
    """
    config = GateConfig() if config is None else config
    if any(isinstance(module, FusedGatedLinear) for module in model.modules()):
        raise ValueError("model is gated already; gate_ works on plain Linears")
    architecture = architecture_of(model)
    names = select(model, config, architecture)
    price = price_of(config)
    for linear in map(model.get_submodule, names):
        price((linear.out_features, linear.in_features), 0, 0)  # type: ignore[arg-type]
    layers = {
        name: FusedGatedLinear.from_linear(model.get_submodule(name), config)  # type: ignore[arg-type]
        for name in names
    }
    if config.tie == "unit":
        _tie(layers, architecture)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    _freeze(model, config, names)
    record_gated(model, config, names)
    return model


def freeze_(model: Model, config: GateConfig | None = None) -> Model:
    """Freeze what `gate_` freezes and put no gate in: its adaptation with nothing to remove.

    Args:
        model: a plain model.
        config: as `gate_` takes it.

    Returns:
        The same model.

    Raises:
        ValueError: as `gate_` does.
    """
    config = GateConfig() if config is None else config
    if any(isinstance(module, FusedGatedLinear) for module in model.modules()):
        raise ValueError("model is gated already; freeze_ works on plain Linears")
    _freeze(model, config, select(model, config, architecture_of(model)))
    return model


def select(model: nn.Module, config: GateConfig, architecture: Architecture) -> list[str]:
    """Return the names of the Linears that ``config.modules`` selects, in model order.

    Raises:
        ValueError: a pattern matches no Linear, or there is no default for this architecture.
    """
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(
                f"model: {name!r} is a Linear inside an adapter ({type(module).__name__}); merge "
                "it first (merge_and_unload) or train a LoRA inside the gates (lora_rank)"
            )
    linears = [name for name, module in model.named_modules() if name and type(module) is nn.Linear]
    if config.modules is None:
        names = [name for name in architecture.linears if name in set(linears)]
        if not names:
            raise ValueError(
                f"modules=None: no default for {type(model).__name__}, whose blocks are unknown; "
                "name the Linears to gate by patterns"
            )
        return names
    for pattern in config.modules:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(f"modules: pattern {pattern!r} matches no nn.Linear of the model")
    names = [name for name in linears if _matches(name, config.modules)]
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    for name in names:
        others = places[model.get_submodule(name)][1:]
        if others:
            raise ValueError(
                f"modules: {name!r} is the same layer as {others[0]!r}; give each place its own"
            )
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise ValueError(
                f"modules: {name!r} lies in an nn.TransformerEncoderLayer, whose fast path reads "
                "the weight without its gates"
            )
    return names


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _tie(layers: dict[str, FusedGatedLinear], architecture: Architecture) -> None:
    """Give one gate to what can only die together, and to columns that read the same input.

    A coupling's gate sits on one side alone, the one its units' output passes through. A closed
    gate there kills the unit as surely as one on every side, but its partners still compute, so
    that its gradient tells what the unit would be worth; with both sides closed it would be 0.
    """
    for coupling in architecture.couplings:
        one: Gate | None = None
        for side in coupling.sides:
            gate = _gate(layers, side)
            if gate is None:
                continue
            if one is None:
                layout, device = coupling.layout(side), gate.logits.device
                one = Gate(gate.size, gate.config, layout, device).train(gate.training)
                setattr(layers[side.module], f"{side.axis}_gate", one)
            else:
                setattr(layers[side.module], f"{side.axis}_gate", None)
    for sides in architecture.shared_inputs:
        gates = [gate for side in sides if (gate := _gate(layers, side))]
        for gate in gates[1:]:
            gate.logits = gates[0].logits


def _gate(layers: dict[str, FusedGatedLinear], side: Side) -> Gate | None:
    layer = layers.get(side.module)
    return None if layer is None else layer.gate(side.axis)


def _freeze(model: nn.Module, config: GateConfig, names: Iterable[str]) -> None:
    parameters = [name for name, _ in model.named_parameters()]
    for pattern in set(config.trainable) - set(GateConfig.trainable):
        if not any(fnmatchcase(name, pattern) for name in parameters):
            # Not an error: a checkpoint gated with its head also loads without it.
            warnings.warn(f"trainable: {pattern!r} matches no parameter", stacklevel=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_matches(name, config.trainable))
    for linear in map(model.get_submodule, names):
        linear.weight.requires_grad_(config.train_weight)
        if linear.bias is not None:
            linear.bias.requires_grad_(config.train_bias)
    for module in model.modules():
        if isinstance(module, (Gate, LoRA)):
            module.requires_grad_(True)
