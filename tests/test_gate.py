"""`gate_`: which Linears get gates, what stays trainable, what is tied, and what is refused."""

from __future__ import annotations

import copy
import json
import types
from typing import Any

import pytest
import torch
from torch import nn

from finegates import FusedGatedLinear, Gate, GateConfig, GateMap, gate_, prune_
from finegates.surgery import architecture_of, freeze_
from tiny_models import build, logits

BLOCK_LINEARS = {"bert": 6, "roberta": 6, "llama": 7, "qwen2": 7}


def gated_names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, FusedGatedLinear)]


@pytest.mark.parametrize("model_type", BLOCK_LINEARS)
@pytest.mark.parametrize("tie", ["unit", "none"])
def test_default_selection_is_the_blocks(model_type: str, tie: str) -> None:
    model = build(model_type)
    assert gate_(model, GateConfig(tie=tie)) is model
    names = gated_names(model)
    assert len(names) == 2 * BLOCK_LINEARS[model_type]
    assert all(".layer" in name for name in names)
    assert not any("embed" in n or "lm_head" in n or "decoder" in n for n in names)


@pytest.mark.parametrize("model_type", BLOCK_LINEARS)
@pytest.mark.parametrize("tie", ["unit", "none"])
@pytest.mark.parametrize("distribution", ["ranking", "gaussian", "hard_concrete"])
def test_fresh_gates_change_nothing(model_type: str, tie: str, distribution: str) -> None:
    model = build(model_type)
    before = logits(model)
    gate_(model, GateConfig(tie=tie, distribution=distribution, init_mean=20.0))
    assert torch.equal(logits(model), before)


def test_default_config() -> None:
    model = gate_(build("bert", layers=1))
    assert (
        next(m for m in model.modules() if isinstance(m, FusedGatedLinear)).config == GateConfig()
    )


def test_patterns_select_by_full_name() -> None:
    model = build("llama")
    gate_(model, GateConfig(modules=("*.0.mlp.*", "model.layers.1.self_attn.q_proj")))
    assert sorted(gated_names(model)) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert type(model.model.layers[1].self_attn.k_proj) is nn.Linear


def test_patterns_are_case_sensitive_and_each_must_match() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=r"modules: pattern '\*Q_proj' matches no nn.Linear"):
        gate_(model, GateConfig(modules=("*.q_proj", "*Q_proj")))
    with pytest.raises(ValueError, match="pattern 'embed_tokens' matches no nn.Linear"):
        gate_(model, GateConfig(modules=("embed_tokens",)))
    assert gated_names(model) == []
    assert all(p.requires_grad for p in model.parameters()), "a refused gate_ must change nothing"


def test_unknown_architecture_needs_patterns() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="modules=None: no default for Sequential"):
        gate_(model)
    gate_(model, GateConfig(modules=("1",)))
    assert gated_names(model) == ["1"]
    assert not hasattr(model, "config")


def test_bare_linear_is_no_container() -> None:
    with pytest.raises(ValueError, match=r"pattern '\*' matches no nn.Linear"):
        gate_(nn.Linear(3, 3), GateConfig(modules=("*",)))


def test_gating_twice_is_refused() -> None:
    model = gate_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), GateConfig(modules=("0",)))
    with pytest.raises(ValueError, match="gated already"):
        gate_(model, GateConfig(modules=("1",)))
    prune_(model)
    gate_(model, GateConfig(modules=("1",)))


def test_gating_what_prune_left() -> None:
    """A pruned model may be gated again where it is still dense."""
    model = build("llama").double()
    gate_(model, GateConfig())
    with torch.no_grad():
        for gate in GateMap(model).gates():
            gate.logits[::3] = -1.0
    prune_(model)
    before = logits(model)
    gate_(model, GateConfig(modules=("lm_head",), init_mean=1.0))
    with torch.no_grad():
        model.lm_head.column_gate.logits[:5] = -1.0
    closed = logits(model)
    assert not torch.equal(closed, before)
    torch.testing.assert_close(logits(prune_(model)), closed, rtol=1e-10, atol=1e-10)


def test_subclasses_of_linear_are_left_alone() -> None:
    model = nn.MultiheadAttention(8, 2)
    assert isinstance(model.out_proj, nn.Linear)
    with pytest.raises(ValueError, match="matches no nn.Linear"):
        gate_(model, GateConfig(modules=("*",)))


def test_encoder_layer_of_torch_is_refused() -> None:
    """Its fast path computes with linear1.weight in evaluation, past any gate."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(ValueError, match=r"'layers.0.linear1' lies in an nn.TransformerEncoderL"):
        gate_(model, GateConfig(modules=("*linear1",)))
    assert gated_names(model) == []


@pytest.mark.parametrize("train_bias", [True, False])
@pytest.mark.parametrize("train_weight", [True, False])
def test_what_stays_trainable(train_bias: bool, train_weight: bool) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=61, hidden_size=24, num_attention_heads=3, intermediate_size=20,
        num_hidden_layers=1, max_position_embeddings=40,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config)
    gate_(model, GateConfig(train_bias=train_bias, train_weight=train_weight))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    blocks = architecture_of(model).linears
    expected = {f"classifier.{n}.{k}" for n in ("dense", "out_proj") for k in ("weight", "bias")}
    expected |= {f"{name}.weight" for name in blocks if train_weight}
    expected |= {f"{name}.bias" for name in blocks if train_bias}
    expected |= {name for name, _ in model.named_parameters() if name.endswith("logits")}
    assert trained == expected
    assert len(trained) < len(list(model.parameters()))


@pytest.mark.parametrize("train_weight", [False, True])
def test_freeze_freezes_what_gate_does_and_gates_nothing(train_weight: bool) -> None:
    config = GateConfig(train_weight=train_weight, trainable=("cls.*",))
    plain, gated = build("bert"), gate_(build("bert"), config)
    before = logits(plain)
    assert freeze_(plain, config) is plain
    assert torch.equal(logits(plain), before)
    assert gated_names(plain) == []
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == {
        n for n, p in gated.named_parameters() if p.requires_grad and not n.endswith(".logits")
    }
    with pytest.raises(ValueError, match="gated already; freeze_ works on plain"):
        freeze_(gated)


def test_trainable_patterns_reach_any_parameter() -> None:
    model = build("bert", layers=1)
    gate_(model, GateConfig(trainable=("*LayerNorm.weight",), train_bias=False))
    for name, parameter in model.named_parameters():
        wanted = name.endswith(("LayerNorm.weight", "logits"))
        assert parameter.requires_grad == wanted, name


def test_weights_and_training_mode_are_kept() -> None:
    model = build("bert", layers=1)
    weights = dict(model.named_parameters())
    model.eval()
    model.bert.encoder.layer[0].intermediate.train()
    gate_(model)
    for name, parameter in weights.items():
        assert model.get_parameter(name) is parameter
    for name in gated_names(model):
        layer = model.get_submodule(name)
        training = ".intermediate." in name
        assert layer.training is training
        for gate in (layer.row_gate, layer.column_gate):
            assert gate is None or gate.training is training


def test_gates_are_made_on_the_weights_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    gate_(model, GateConfig(modules=("0",)))
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_unit_ties_kill_every_partner(model_type: str) -> None:
    """Closing one unit of a coupling's gate closes it on each of the coupling's sides."""
    model = build(model_type, layers=1)
    gates = GateMap(gate_(model, GateConfig(tie="unit")))
    assert gates.couplings
    for coupling in gates.couplings:
        gate = next(g for side in coupling.sides if (g := gates.gate(side)) is not None)
        units = gate.logits.numel()
        assert units == coupling.groups * coupling.width
        with torch.no_grad():
            gate.logits[units - 1] = -1.0
        alive = gates.alive()
        for side in coupling.sides:
            dead = (~alive[side]).view(coupling.groups, -1, coupling.pairs, coupling.width)
            assert dead[-1, ..., -1].all()
            assert int(dead.sum()) == dead[-1, ..., -1].numel()


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_columns_of_one_input_share_their_gate(model_type: str) -> None:
    model = build(model_type, layers=1)
    gates = GateMap(gate_(model, GateConfig(tie="unit")))
    for sides in architecture_of(model).shared_inputs:
        assert len({id(gates.gate(side).logits) for side in sides}) == 1  # type: ignore[union-attr]
        assert len(sides) >= 2


def test_untied_gates_are_all_distinct() -> None:
    for model_type in ("bert", "llama"):
        model = gate_(build(model_type, layers=1), GateConfig(tie="none"))
        modules = [m for m in model.modules() if isinstance(m, Gate)]
        assert len({id(m.logits) for m in modules}) == len(modules)
        assert len(modules) == 2 * len(gated_names(model))


def test_ties_survive_deepcopy_and_casts() -> None:
    model = gate_(build("llama", layers=1), GateConfig(tie="unit"))
    count = len(GateMap(model).gates())
    twin = copy.deepcopy(model).to(torch.bfloat16)
    assert len(GateMap(twin).gates()) == count
    for gate in GateMap(twin).gates():
        assert gate.logits.dtype == torch.float32
    with torch.no_grad():
        for gate in GateMap(twin).gates():
            gate.logits.fill_(-1.0)
    assert GateMap(model).removal().removed == 0


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_one_side_only(side: str) -> None:
    model = gate_(build("llama", layers=1), GateConfig(tie="unit", **{side: False}))
    for name in gated_names(model):
        layer = model.get_submodule(name)
        assert (layer.row_gate if side == "rows" else layer.column_gate) is None
    logits(model)


def test_record_is_json_and_names_the_modules() -> None:
    model = gate_(build("llama", layers=1), GateConfig(sparsity=0.3))
    record = json.loads(json.dumps(model.config.quantization_config))
    assert record["quant_method"] == "finegates"
    assert record["state"] == "gated"
    config = GateConfig.from_dict(record["gate_config"])
    assert config.sparsity == 0.3
    assert sorted(config.modules or ()) == sorted(gated_names(model))


@pytest.mark.parametrize("config", [{"a": 1}, types.MappingProxyType({}), "text", None, 3], ids=str)
def test_foreign_config_attribute_is_not_touched(config: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.config = config
    gate_(model, GateConfig(modules=("0",)))
    with torch.no_grad():
        model[0].row_gate.logits[0] = -1.0  # type: ignore[union-attr]
    prune_(model)
    assert model.config is config
    if isinstance(config, dict):
        assert config == {"a": 1}


def test_layer_at_two_places_is_refused() -> None:
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    with pytest.raises(ValueError, match="'0' is the same layer as '2'"):
        gate_(model, GateConfig(modules=("*",)))


def test_trainable_pattern_without_a_match_warns() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"trainable: 'head\.\*' matches no parameter"):
        gate_(model, GateConfig(modules=("*",), trainable=("head.*",)))


def test_activation_is_probed_under_the_meta_device() -> None:
    model = build("bert")
    with torch.device("meta"):
        assert len(architecture_of(model).couplings) == 6
