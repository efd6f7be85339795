"""What dies together: which model types are coupled, and brute force over the fixpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from finegates import GateConfig, GateMap, gate_, prune_
from finegates.surgery import Coupling, Side, architecture_of
from finegates.surgery.couplings import BERT_TYPES, LLAMA_TYPES, ORDER, PROBABILITY
from numerics import relative_difference
from tiny_models import alive_by_definition, build, logits, open_gates, scatter_gates_

BERT_LINEARS = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
LLAMA_LINEARS = [
    *(f"self_attn.{n}_proj" for n in "qkvo"),
    *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
]


@pytest.mark.parametrize("model_type", BERT_TYPES)
def test_bert_blocks(model_type: str) -> None:
    model = build(model_type)
    architecture = architecture_of(model)
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and ".layer." in n]
    assert sorted(architecture.linears) == sorted(names)
    assert len(names) == 2 * len(BERT_LINEARS)
    assert architecture.family == "bert"
    assert len(architecture.couplings) == 2 * 3
    assert len(architecture.shared_inputs) == 2
    private = {side.module for c in architecture.couplings for side in c.sides if c.private}
    assert {name.partition(".layer.")[2] for name in private} == {
        f"{i}.{name}" for i in (0, 1) for name in ("intermediate.dense", "output.dense")
    }


@pytest.mark.parametrize("model_type", LLAMA_TYPES)
def test_llama_blocks(model_type: str) -> None:
    model = build(model_type)
    architecture = architecture_of(model)
    expected = [f"model.layers.{i}.{name}" for i in (0, 1) for name in LLAMA_LINEARS]
    assert sorted(architecture.linears) == sorted(expected)
    assert architecture.family == "llama"
    # Qwen3 normalises queries and keys per head: they are not coupled.
    assert len(architecture.couplings) == 2 * (2 if model_type == "qwen3" else 3)
    assert [len(sides) for sides in architecture.shared_inputs] == [3, 2] * 2


@pytest.mark.parametrize("model_type", [*BERT_TYPES, *LLAMA_TYPES])
@pytest.mark.parametrize("tie", ["unit", "none"])
def test_coupled_types_are_pruned_exactly(model_type: str, tie: str) -> None:
    """Every listed type has earned its place: removal with couplings changes nothing in fp64."""
    changes = {"sliding_window": 64} if model_type in ("gemma2", "mistral") else {}
    model = build(model_type, **changes).double()
    gate_(model, GateConfig(tie=tie))
    scatter_gates_(model, 0.7)
    before = logits(model)
    removed = GateMap(model).removal()
    assert 0.2 < removed.fraction < 0.95
    assert relative_difference(logits(prune_(model)), before) < 1e-10


UNLISTED: dict[str, tuple[Any, dict[str, Any]]] = {
    # rotates interleaved pairs of queries and keys
    "roformer": (AutoModelForMaskedLM, {"embedding_size": 24, "rotary_value": True}),
    # normalises queries and keys before hashing
    "yoso": (AutoModelForMaskedLM, {"use_expectation": True, "conv_window": None}),
    # convolves over queries and keys, value width is not the output's
    "convbert": (AutoModelForMaskedLM, {"embedding_size": 24, "head_ratio": 1}),
    # norms between value and output, and inside the MLP
    "bitnet": (AutoModelForCausalLM, {}),
    # interleaved rotary pairs
    "cohere": (AutoModelForCausalLM, {}),
    # normalises queries and keys over all heads
    "olmo2": (AutoModelForCausalLM, {}),
    # differential attention
    "diffllama": (AutoModelForCausalLM, {}),
}  # fmt: skip


@pytest.mark.parametrize("model_type", UNLISTED)
def test_lookalikes_are_not_coupled_and_stay_exact(model_type: str) -> None:
    """Same module names, other arithmetic: gates work, nothing dies with a partner."""
    auto, changes = UNLISTED[model_type]
    causal = auto is AutoModelForCausalLM
    sizes: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2,
        "intermediate_size": 20, "max_position_embeddings": 40, "pad_token_id": 0,
    }  # fmt: skip
    if causal:
        sizes.update(num_key_value_heads=2, head_dim=6)
    model = auto.from_config(AutoConfig.for_model(model_type, **sizes, **changes)).eval().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(0.3 * noise + (1.0 if parameter.dim() == 1 else 0.0))
    architecture = architecture_of(model)
    assert architecture.family == ("llama" if causal else "bert")
    assert architecture.couplings == ()
    gate_(model, GateConfig(tie="none"))
    scatter_gates_(model, 0.7)
    before = logits(model)
    assert relative_difference(logits(prune_(model)), before) < 1e-10


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
        self.act_fn = nn.SiLU()


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.head_dim = 4


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(), _Mlp()


def test_names_alone_couple_nothing() -> None:
    architecture = architecture_of(nn.Sequential(_Block(), _Block()))
    assert architecture.family == "llama"
    assert len(architecture.linears) == 14
    assert architecture.couplings == ()


def test_plain_modules_are_unknown() -> None:
    architecture = architecture_of(nn.Sequential(nn.Linear(2, 2)))
    assert architecture.family is None
    assert architecture.linears == architecture.couplings == architecture.shared_inputs == ()


def test_activation_that_moves_zero_is_not_coupled() -> None:
    model = build("bert", layers=1, hidden_act="sigmoid")
    assert not any(c.private for c in architecture_of(model).couplings)
    model.double()
    gate_(model, GateConfig(tie="none"))
    scatter_gates_(model, 0.6)
    before = logits(model)
    assert relative_difference(logits(prune_(model)), before) < 1e-10


def test_partial_rotary_is_not_coupled() -> None:
    model = build("llama", layers=1)
    for block in model.model.layers:
        block.self_attn.config.rope_parameters["partial_rotary_factor"] = 0.5
    sides = {side.module for c in architecture_of(model).couplings for side in c.sides}
    assert not any(name.endswith(("q_proj", "k_proj")) for name in sides)


def test_every_side_is_in_one_coupling() -> None:
    """One pass over the couplings is the fixpoint only then."""
    for model_type in (*BERT_TYPES, *LLAMA_TYPES):
        architecture = architecture_of(build(model_type))
        sides = [side for c in architecture.couplings for side in c.sides]
        assert len(sides) == len(set(sides))


MODELS: list[tuple[str, dict[str, Any]]] = [
    ("bert", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 2}),
    ("llama", {"num_key_value_heads": 1}),
]


@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=["bert", "mha", "gqa", "mqa"])
@pytest.mark.parametrize("tie", ["unit", "none"])
@pytest.mark.parametrize("distribution", ["ranking", "gaussian", "hard_concrete"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_alive_set_is_the_definition(
    model_type: str, changes: dict[str, Any], tie: str, distribution: str, share: float
) -> None:
    """No more and no less than docs/method.md says, by an independent fixpoint in Python loops."""
    model = build(model_type, layers=1, **changes)
    gates = GateMap(gate_(model, GateConfig(distribution=distribution, tie=tie)))
    for seed in range(3):
        scatter_gates_(model, share, seed)
        expected = alive_by_definition(model, open_gates(gates))
        alive = gates.alive()
        assert alive.keys() == expected.keys()
        for side, value in alive.items():
            assert torch.equal(value, expected[side]), side
            assert torch.equal(gates.margins()[side] > 0, value), side
        assert any(not torch.equal(v, open_gates(gates)[s]) for s, v in alive.items())


@pytest.mark.parametrize("pattern", ["*q_proj", "*v_proj", "*o_proj", "*up_proj", "*down_proj"])
@pytest.mark.parametrize("tie", ["unit", "none"])
def test_alive_set_with_ungated_partners(pattern: str, tie: str) -> None:
    model = build("llama", layers=1)
    gates = GateMap(gate_(model, GateConfig(tie=tie, modules=(pattern,))))
    scatter_gates_(model, 0.5)
    expected = alive_by_definition(model, open_gates(gates))
    for side, value in gates.alive().items():
        assert torch.equal(value, expected[side]), side


LAYOUTS = st.tuples(*(st.integers(1, 3) for _ in range(4)))


@settings(max_examples=100)
@given(st.data())
def test_resolve_is_a_fixpoint(data: st.DataObject) -> None:
    """Resolving twice changes nothing, resolved values never exceed the given ones."""
    groups, repeats, pairs, width = data.draw(LAYOUTS)
    ones = data.draw(st.integers(1, 2)) if repeats == pairs == 1 else 1
    many = Side("many", "column")
    sides = tuple(Side(f"one{i}", "row") for i in range(ones))
    coupling = Coupling(many, sides, groups, repeats, pairs, width)
    values = {side: torch.randn(groups * pairs * width) for side in sides}
    values[many] = torch.randn(groups * repeats * pairs * width)
    once = coupling.resolve(values, ORDER)
    twice = coupling.resolve(once, ORDER)
    for side in (many, *sides):
        assert (once[side] <= values[side]).all()
        alive = once[side] > 0
        assert torch.equal(alive, twice[side] > 0)
    # Each unit has survivors on every side or on none.
    survivors = [
        (once[side].view(groups, -1, pairs, width) > 0).any(2).any(1) for side in (many, *sides)
    ]
    for other in survivors[1:]:
        assert torch.equal(survivors[0], other)


def test_probability_algebra_by_hand() -> None:
    coupling = Coupling(Side("q", "row"), (Side("k", "row"),), 1, 2, 1, 1)
    p = {Side("q", "row"): torch.tensor([0.5, 0.2]), Side("k", "row"): torch.tensor([0.4])}
    resolved = coupling.resolve(p, PROBABILITY)
    torch.testing.assert_close(resolved[Side("q", "row")], torch.tensor([0.2, 0.08]))
    torch.testing.assert_close(resolved[Side("k", "row")], torch.tensor([0.4 * 0.6]))
