"""What gates are compared with: each method prepares the same model for the same training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..config import GateConfig
from ..gates import Gate
from ..hf.trainer import GatedTrainer
from ..surgery import GateMap, architecture_of, freeze_, gate_
from ..surgery.gate import select
from ..surgery.importance import input_norms, rank_by_weights_

Batches = Sequence[Mapping[str, Any]]
Prepare = Callable[[Any, GateConfig, Batches], Any]


def dense(model: Any, config: GateConfig, batches: Batches) -> Any:
    """Full fine-tuning: every parameter is trained, nothing is removed."""
    return model


def head(model: Any, config: GateConfig, batches: Batches) -> Any:
    """Head and biases: what `gate_` trains besides gates, with nothing removed."""
    return freeze_(model, config)


def lora(model: Any, config: GateConfig, batches: Batches) -> Any:
    """LoRA of ``lora_rank``, or 8, on the Linears that gates would be on, beside `head`."""
    from peft import LoraConfig, inject_adapter_in_model

    names = select(model, config, architecture_of(model))
    trained = [p for p in freeze_(model, config).parameters() if p.requires_grad]
    adapter = LoraConfig(
        r=config.lora_rank or 8,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=names,
    )
    model = inject_adapter_in_model(adapter, model)
    for parameter in trained:  # peft freezes all but its own
        parameter.requires_grad_(True)
    return model


def gates(model: Any, config: GateConfig, batches: Batches) -> Any:
    """Gates, biases and head, as `GateConfig` says; with the method ``"paper"`` the authors'."""
    return gate_(model, config)


def magnitude(model: Any, config: GateConfig, batches: Batches) -> Any:
    """One-shot: the units with the least Σ |w| close before training; head and biases recover."""
    return _close(gate_(model, config), config, None)


def activation(model: Any, config: GateConfig, batches: Batches) -> Any:
    """One-shot: as `magnitude`, by Σ |w| ‖x‖ over calibration batches."""
    gate_(model, config)
    return _close(model, config, input_norms(model, GateMap(model).linears, batches))


def two_of_four(model: Any, config: GateConfig, batches: Batches) -> Any:
    """2:4 masks: of 4 neighbouring weights the 2 with the largest |w| ‖x‖ stay; then as `head`.

    Half of each weight is 0 and nothing is removed: a pattern that some GPUs multiply faster.
    """
    names = select(model, config, architecture_of(model))
    linears = {name: model.get_submodule(name) for name in names}
    norms = input_norms(model, linears, batches)
    for name, linear in linears.items():
        _keep_two_of_four_(linear.weight, norms[name])
    return freeze_(model, config)


METHODS: Mapping[str, Prepare] = {
    "dense": dense,
    "head": head,
    "lora": lora,
    "gates": gates,
    "paper": gates,
    "magnitude": magnitude,
    "activation": activation,
    "2:4": two_of_four,
}


def trainer_class(model: nn.Module) -> type[Trainer]:
    """Return `GatedTrainer` where gates are trained, else transformers' own."""
    trained = any(isinstance(m, Gate) and m.logits.requires_grad for m in model.modules())
    return GatedTrainer if trained else Trainer


def _close(model: Any, config: GateConfig, norms: Mapping[str, Tensor] | None) -> Any:
    """Close the least important units for good."""
    units = GateMap(model)
    rank_by_weights_(units, norms)
    units.project_(config.sparsity)
    for gate in units.gates():
        gate.logits.requires_grad_(False)
    return model


@torch.no_grad()
def _keep_two_of_four_(weight: Tensor, norms: Tensor) -> None:
    scores = (weight.abs() * norms).view(-1, 4)
    least = scores.topk(2, dim=1, largest=False).indices
    weight.view(-1, 4).scatter_(1, least, 0.0)
