"""Tiny transformers models with large weights, random gates, and "dead" written out by hand."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from finegates import GateMap
from finegates.surgery import Side

VOCABULARY = 61
_ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 20,
    "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
_DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "intermediate_size": 20, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def build(model_type: str, layers: int = 2, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a language model of the type in evaluation mode, every parameter far from its default.

    Args:
        model_type: as in transformers' configs; a Llama has 4 query and 2 key-value heads.
        layers, changes: fields of the config.
        seed: of the weights.
    """
    encoder = not hasattr(AutoConfig.for_model(model_type), "num_key_value_heads")
    fields = {**(_ENCODER if encoder else _DECODER), "num_hidden_layers": layers, **changes}
    config = AutoConfig.for_model(model_type, **fields)
    auto = AutoModelForMaskedLM if encoder else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1.0 + 0.2 * noise if norm else 0.35 * noise)
    return model.eval()


def inputs(seed: int = 0, batch: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Return token ids and a mask that pads the end of the later sequences."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(batch):
        mask[i, length - 2 * i :] = 0
    mask[0] = 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Return the model's logits at `inputs`."""
    result: Tensor = model(**inputs()).logits
    return result


@torch.no_grad()
def scatter_gates_(model: nn.Module, open_share: float, seed: int = 0) -> None:
    """Close each unit with probability 1 - ``open_share``; open gates are fractional or full."""
    generator = torch.Generator().manual_seed(seed)
    for gate in GateMap(model).gates():
        uniform = torch.rand(2, gate.logits.numel(), generator=generator)
        closing = gate.config.closing_logit
        opening = dataclasses.replace(gate.config, init_mean=None).start_logit
        distance = (0.05 + 1.5 * uniform[0]) * (opening - closing)
        gate.logits.copy_(closing + torch.where(uniform[1] < open_share, distance, -distance))


# A unit dies as a whole once the elements of one of its sides are all dead.
Unit = list[tuple[Side, list[int]]]


def alive_by_definition(model: PreTrainedModel, is_open: dict[Side, Tensor]) -> dict[Side, Tensor]:
    """Return per side which elements are alive: docs/method.md in loops over heads and features.

    It shares nothing with `finegates.surgery` but the names of modules.

    Args:
        model: of `build`; for its config and module names.
        is_open: per side whether each element's own gate is open. A unit with a side that isn't in
            it is no unit.
    """
    alive = {side: value.tolist() for side, value in is_open.items()}
    units = [
        unit
        for name, _ in model.named_modules()
        if re.search(r"\.layers?\.\d+$", name)
        for unit in _units(model.config, name)
        if all(side in alive for side, _ in unit)
    ]
    changed = True
    while changed:
        changed = False
        for unit in units:
            if any(not any(alive[side][i] for i in elements) for side, elements in unit):
                for side, elements in unit:
                    changed |= any(alive[side][i] for i in elements)
                    for i in elements:
                        alive[side][i] = False
    return {side: torch.tensor(values, dtype=torch.bool) for side, values in alive.items()}


def _units(config: Any, block: str) -> list[Unit]:
    def side(name: str, axis: Any) -> Side:
        return Side(f"{block}.{name}", axis)

    if hasattr(config, "num_key_value_heads"):
        head, groups = config.head_dim, config.num_key_value_heads
        repeats = config.num_attention_heads // groups
        half = head // 2
        q, k, v, o = (f"self_attn.{n}_proj" for n in "qkvo")
        units: list[Unit] = []
        for group in range(groups):
            queries = range(group * repeats, (group + 1) * repeats)
            for d in range(head):
                units.append(
                    [
                        (side(v, "row"), [group * head + d]),
                        (side(o, "column"), [query * head + d for query in queries]),
                    ]
                )
            for pair in ((d, d + half) for d in range(half)):
                units.append(
                    [
                        (side(k, "row"), [group * head + d for d in pair]),
                        (side(q, "row"), [query * head + d for query in queries for d in pair]),
                    ]
                )
        gate, up, down = (f"mlp.{n}_proj" for n in ("gate", "up", "down"))
        for i in range(config.intermediate_size):
            units.append(
                [(side(gate, "row"), [i]), (side(up, "row"), [i]), (side(down, "column"), [i])]
            )
        return units
    pairs = [
        (config.hidden_size, "attention.self.key", "row", "attention.self.query"),
        (config.hidden_size, "attention.output.dense", "column", "attention.self.value"),
        (config.intermediate_size, "output.dense", "column", "intermediate.dense"),
    ]
    return [
        [(side(first, axis), [i]), (side(second, "row"), [i])]
        for size, first, axis, second in pairs
        for i in range(size)
    ]


def open_gates(gates: GateMap) -> dict[Side, Tensor]:
    """Return per side whether each element's own evaluation gate is open."""
    result = {}
    for side in gates.sides():
        gate, linear = gates.gate(side), gates.linears[side.module]
        size = linear.out_features if side.axis == "row" else linear.in_features
        result[side] = torch.ones(size, dtype=torch.bool) if gate is None else gate.value() > 0
    return result
