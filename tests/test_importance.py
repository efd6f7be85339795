"""Importance by weights: sums over whole units, written out by hand, and what one-shot closes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finegates import GateConfig, GateMap, gate_
from finegates.surgery import Side
from finegates.surgery.importance import input_norms, rank_by_weights_
from tiny_models import build, inputs


def gated(model_type: str, **changes: object) -> tuple[nn.Module, GateMap]:
    model = gate_(build(model_type), GateConfig(**changes))  # type: ignore[arg-type]
    return model, GateMap(model)


def relative(sums: Tensor) -> Tensor:
    return torch.log(sums / sums.mean())


def test_unit_sums_of_an_encoder() -> None:
    _, gates = gated("bert")
    rank_by_weights_(gates)
    block = "bert.encoder.layer.0."
    weight = {name.removeprefix(block): m.weight.abs() for name, m in gates.linears.items()}
    neurons = weight["intermediate.dense"].sum(1) + weight["output.dense"].sum(0)
    inner = gates.deciding()[Side(f"{block}intermediate.dense", "row")]
    assert inner is not None
    torch.testing.assert_close(inner.logits.detach(), relative(neurons))
    parts = (weight[f"attention.self.{name}"].sum(0) for name in ("query", "key", "value"))
    shared = gates.gate(Side(f"{block}attention.self.key", "column"))
    assert shared is not None
    torch.testing.assert_close(shared.logits.detach(), relative(sum(parts, torch.zeros(()))))


def test_unit_sums_of_grouped_heads() -> None:
    """Two query heads share a key head; rotary pairs (d, d + 3) go together."""
    model, gates = gated("llama")
    norms = {name: 1.0 + torch.rand(m.in_features) for name, m in gates.linears.items()}
    rank_by_weights_(gates, norms)
    block = "model.layers.1.self_attn."
    query, key = (
        (model.get_submodule(block + name).weight.abs() * norms[block + name]).sum(1)
        for name in ("q_proj", "k_proj")
    )
    units = torch.stack(
        [
            sum((query[6 * head + d] for head in (2 * group, 2 * group + 1) for d in (i, i + 3)),
                start=key[6 * group + i] + key[6 * group + i + 3])
            for group in range(2) for i in range(3)
        ]
    )  # fmt: skip
    gate = gates.deciding()[Side(block + "k_proj", "row")]
    assert gate is not None
    torch.testing.assert_close(gate.logits.detach(), relative(units).detach())


def test_independent_gates_rank_their_own_side() -> None:
    _, gates = gated("bert", tie="none")
    rank_by_weights_(gates)
    name = "bert.encoder.layer.0.output.dense"
    column = gates.gate(Side(name, "column"))
    assert column is not None
    expected = relative(gates.layers[name].weight.abs().sum(0))
    torch.testing.assert_close(column.logits.detach(), expected.detach())


def test_input_norms_are_those_of_the_inputs() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).train()
    linears = {"0": model[0], "2": model[2]}
    batches = [{"input": torch.randn(2, 7, 5)}, {"input": torch.randn(3, 7, 5)}]
    norms = input_norms(model, linears, batches)  # type: ignore[arg-type]
    x = torch.cat([batch["input"].reshape(-1, 5) for batch in batches])
    torch.testing.assert_close(norms["0"], x.norm(dim=0))
    torch.testing.assert_close(norms["2"], model[1](model[0](x)).norm(dim=0).detach())
    assert model.training
    assert not model[0]._forward_pre_hooks


def test_a_unit_without_input_goes_first() -> None:
    model, gates = gated("bert")
    norms = input_norms(model, gates.linears, [inputs()])
    layer = "bert.encoder.layer.1.intermediate.dense"
    norms[layer][3] = 0.0
    rank_by_weights_(gates, norms)
    assert gates.project_(0.3).fraction == pytest.approx(0.3, abs=0.01)
    assert not gates.alive()[Side(layer, "column")][3]
