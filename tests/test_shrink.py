"""Training on what is left: every step computes what the masked step computes, on less."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finegates import FusedGatedLinear, Gate, GateConfig, GateMap, gate_
from finegates.nn import Held
from finegates.surgery import GateController, budget, shrink
from finegates.surgery.budget import on_host
from finegates.surgery.shrink import expand_, shrink_
from numerics import assert_no_worse, relative_difference
from tiny_models import build, inputs, logits, scatter_gates_

STEPS = 12
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "bert-untied": ("bert", {"tie": "none"}),
    "bert-lora": ("bert", {"lora_rank": 3}),
    "llama": ("llama", {}),
    "llama-untied-lora": ("llama", {"tie": "none", "lora_rank": 3}),
    "llama-weights": ("llama", {"train_weight": True}),
    "half-gated": ("llama", {"modules": ("*down_proj", "*q_proj")}),
    "open-only": ("bert", {"closed_gradient": False}),
}


def gated(name: str, **changes: Any) -> tuple[PreTrainedModel, GateConfig]:
    model_type, fields = VARIANTS[name]
    config = GateConfig(sparsity=0.5, warmup=0.25, ramp=0.25, **{**fields, **changes})
    model = gate_(build(model_type).double(), config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "up") and isinstance(module.up, nn.Parameter):
            nn.init.normal_(module.up, std=0.3)
    return model.train(), config


def loss_and_gradients(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    batch = inputs()
    model.zero_grad()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def masked_twin(model: PreTrainedModel, closed_gradient: bool) -> PreTrainedModel:
    """The same gates, computed on whole weights."""
    twin = copy.deepcopy(model)
    expand_(GateMap(twin))
    for module in twin.modules():
        if isinstance(module, (FusedGatedLinear, Gate)):
            module.config = dataclasses.replace(module.config, closed_gradient=closed_gradient)
    return twin


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare with the largest of their kind: some are 0 but for rounding, as a key's bias."""
    assert ours.keys() == expected.keys()
    # Logits and their gradients are fp32.
    for names, tolerance in (
        ([n for n in expected if n.endswith("logits")], 1e-6),
        ([n for n in expected if not n.endswith("logits")], 1e-11),
    ):
        allowed = tolerance * max((float(expected[n].abs().max()) for n in names), default=0.0)
        for n in names:
            assert (ours[n] - expected[n]).abs().max() <= allowed, n


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> int:
    """Fill kept features up, as on a GPU, in fives: sizes are multiples of it and not."""
    multiple = 5
    monkeypatch.setattr(shrink, "alignment", lambda device: multiple)
    return multiple


@pytest.mark.parametrize("name", VARIANTS)
def test_every_step_is_the_masked_step(name: str) -> None:
    """In fp64, loss and every gradient, over a whole schedule in which the ranking moves."""
    every_step_is_the_masked_step(name)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_filled_step_is_the_masked_step(name: str) -> None:
    every_step_is_the_masked_step(name)


def every_step_is_the_masked_step(name: str) -> None:
    model, config = gated(name, shrink_every=3)
    controller = GateController(model, STEPS)
    controller.start()
    rates = {True: 0.3, False: 1e-3}
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": rates[n.endswith("logits")]} for n, p in model.named_parameters()
         if p.requires_grad]
    )  # fmt: skip
    shrunk, masks = [], set()
    for step in range(STEPS):
        controller.begin_step(step)
        dense = config.closed_gradient and step % 3 == 0
        layers = controller.map.layers.values()
        assert all((layer._compact is None) == dense for layer in layers)
        expected, gradients = loss_and_gradients(masked_twin(model, dense))
        loss, ours = loss_and_gradients(model)
        shrunk.append(not dense and controller.map.removal().removed > 0)
        assert abs(loss - expected) <= 1e-12 * expected
        assert_same_gradients(ours, gradients)
        controller.before_step(step)
        optimizer.step()
        controller.after_step(step)
        masks.add(tuple(torch.cat([g.value() for g in controller.map.gates()]).tolist()))
    assert sum(shrunk) >= 5
    assert len(masks) >= 6, "the ranking must move"
    assert controller.finish().fraction == pytest.approx(0.5, abs=0.05)
    assert all(layer._compact is None for layer in layers)


def test_the_inside_of_an_mlp_is_compact() -> None:
    model, _ = gated("bert")
    scatter_gates_(model, 0.5)
    gates = GateMap(model)
    alive = int(gates.alive()[next(s for s in gates.sides() if "intermediate" in s.module)].sum())
    shrink_(gates)
    seen: list[int] = []
    block = model.bert.encoder.layer[0]
    block.intermediate.register_forward_hook(lambda m, i, o: seen.append(o.shape[-1]))
    logits(model)
    assert seen == [alive]
    assert alive < 20


def test_features_are_filled_up_where_the_side_has_as_many(filled: int) -> None:
    """A GPU's kernels get whole multiples; sides without enough dead features stay as they are."""
    seen = set()
    for share in (0.6, 0.9):
        model, _ = gated("bert", tie="none")
        scatter_gates_(model, share)
        gates = GateMap(model)
        shrink_(gates)
        for alive, held in gates.kept.values():
            size, living = len(alive), int(alive.sum())
            kept = torch.arange(size) if held.features is None else held.features.long()
            short = -living % filled
            assert len(kept) == living + (short if living + short <= size else 0)
            assert alive[kept].sum() == living
            if held.living is None:
                assert len(kept) == living
            else:
                assert torch.equal(held.living.bool(), alive[kept])
            seen.add((held.features is None, held.living is None))
    assert {(False, False), (False, True), (True, False)} <= seen


@pytest.mark.parametrize("name", ["bert", "llama-untied-lora"])
def test_a_changed_gate_or_weight_is_seen_at_once(name: str) -> None:
    model, _ = gated(name)
    scatter_gates_(model, 0.6)
    gates = GateMap(model)
    for change in (
        lambda: scatter_gates_(model, 0.7, seed=1),
        lambda: gates.gates()[-1].logits.neg_(),
        lambda: [layer.weight.mul_(1.5) for layer in gates.layers.values()],
        lambda: model.load_state_dict({n: 0.9 * t for n, t in model.state_dict().items()}),
    ):
        shrink_(gates)
        with torch.no_grad():
            change()
        ours = logits(model)
        expand_(gates)
        assert relative_difference(ours, logits(model)) <= 1e-12


def test_compact_weights_are_gathered_when_the_ranking_moves() -> None:
    model, _ = gated("bert")
    scatter_gates_(model, 0.6)
    gates = GateMap(model)
    first, *others = gates.layers.values()
    shrink_(gates)
    before = [layer._compact.weight for layer in gates.layers.values()]
    assert first.column_gate is not None
    with torch.no_grad():
        first.column_gate.logits.mul_(2.0)
    shrink_(gates)
    assert all(
        layer._compact.weight is b for layer, b in zip(gates.layers.values(), before, strict=True)
    )
    with torch.no_grad():
        first.column_gate.logits.neg_()
    shrink_(gates)
    assert first._compact.weight is not before[0]
    assert others[-1]._compact.weight is before[-1]


@pytest.mark.parametrize("layers", [1, 3])
def test_the_host_waits_as_often_for_many_layers_as_for_one(
    layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the check of the logits, once for all masks; all maps go out in one tensor."""
    model = gate_(build("llama", layers=layers), GateConfig(sparsity=0.5))
    scatter_gates_(model, 0.6)
    gates, waits = GateMap(model), []

    def counted(values: Any) -> Any:
        waits.append(len(values))
        return on_host(values)

    for module in (budget, shrink):
        monkeypatch.setattr(module, "on_host", counted)
    shrink_(gates)
    assert len(waits) == 2
    maps = maps_of(gates)
    assert len(maps) >= 5 * layers
    assert len({index.untyped_storage().data_ptr() for index in maps}) == 1
    assert all(index.data_ptr() % 16 == 0 for index in maps)
    shrink_(gates)
    assert all(a is b for a, b in zip(maps, maps_of(gates), strict=True))


def maps_of(gates: GateMap) -> list[Tensor]:
    return [held.features for _, held in gates.kept.values() if held.features is not None]


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("survivor", [None, 0])
def test_nothing_left(name: str, survivor: int | None) -> None:
    """All closed, or one unit of each gate left."""
    model, _ = gated(name)
    for gate in GateMap(model).gates():
        gate.logits.data.fill_(-1.0)
        if survivor is not None:
            gate.logits.data[survivor] = 1.0
    expected, gradients = loss_and_gradients(masked_twin(model, False))
    shrink_(GateMap(model))
    loss, ours = loss_and_gradients(model)
    assert abs(loss - expected) <= 1e-12 * expected
    assert_same_gradients(ours, gradients)


@pytest.mark.parametrize("tie", ["unit", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_low_precision_is_no_worse_than_masked(tie: str, dtype: torch.dtype) -> None:
    model, _ = gated("bert", tie=tie)
    scatter_gates_(model, 0.6)
    model.to(dtype)
    exact = logits(copy.deepcopy(model).double())
    plain = logits(model)
    shrink_(GateMap(model))
    assert_no_worse(logits(model), plain, exact)


def test_checkpointing_and_compiling() -> None:
    model, _ = gated("llama")
    scatter_gates_(model, 0.6)
    expected, gradients = loss_and_gradients(masked_twin(model, False))
    shrink_(GateMap(model))
    model.activation_checkpointing_enable()
    loss, ours = loss_and_gradients(model)
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert_same_gradients(ours, gradients)
    torch.compiler.reset()
    layer = model.model.layers[0].self_attn.o_proj
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.compiler.reset()


def test_state_dict_and_copies_know_nothing_of_it() -> None:
    model, _ = gated("bert")
    scatter_gates_(model, 0.6)
    names = list(model.state_dict())
    shrink_(GateMap(model))
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    assert relative_difference(logits(twin), logits(model)) <= 1e-12


def test_only_binary_gates_can_be_left_out() -> None:
    with pytest.raises(ValueError, match="shrink_every must be 0 for gaussian gates.*got 3"):
        GateConfig(distribution="gaussian", shrink_every=3)
    with pytest.raises(ValueError, match="shrink_every must be a whole number from 0, got -1"):
        GateConfig(shrink_every=-1)
    layer = FusedGatedLinear(4, 4, config=GateConfig(distribution="gaussian"))
    with pytest.raises(ValueError, match="distribution must be 'ranking', got 'gaussian'"):
        layer.shrink_(Held(), Held())
