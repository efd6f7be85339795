"""`prune_`: the pruned model is the gated model, exactly, and nothing dead is left in it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from finegates import FusedGatedLinear, Gate, GateConfig, GateMap, PrunedLinear, gate_, prune_
from finegates.surgery import Side
from numerics import assert_models_no_worse, relative_difference
from tiny_models import (
    VOCABULARY,
    alive_by_definition,
    build,
    inputs,
    logits,
    open_gates,
    scatter_gates_,
)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", {}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
}
ALL = ("ranking", "gaussian", "hard_concrete")


def gated(
    name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    model_type, fields = MODELS[name]
    dense = build(model_type, seed=seed, **fields).to(dtype)
    model: PreTrainedModel = gate_(dense, GateConfig(**changes))
    return model


def close_(model: nn.Module, pattern: dict[int, Tensor]) -> None:
    """Set each distinct gate's logits to ±1 around the closing logit; True is open."""
    with torch.no_grad():
        for gate in GateMap(model).gates():
            mask = pattern[id(gate)]
            gate.logits.copy_(gate.config.closing_logit + torch.where(mask, 0.6, -0.6))


def assert_exact(model: PreTrainedModel) -> None:
    before = logits(model)
    assert before.isfinite().all()
    after = logits(prune_(model))
    if before.abs().max() == 0:
        assert (after == 0).all()
    else:
        assert relative_difference(after, before) <= 1e-10


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("tie", ["unit", "none"])
@pytest.mark.parametrize("share", [0.85, 0.5])
def test_equal_in_fp64(name: str, distribution: str, tie: str, share: float) -> None:
    model = gated(name, distribution=distribution, tie=tie)
    dense = logits(model)
    scatter_gates_(model, share)
    assert relative_difference(logits(model), dense) > 0.1, "the gates must matter"
    assert_exact(model)
    assert not any(isinstance(m, (FusedGatedLinear, Gate)) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_low_precision_is_no_worse_than_gated(
    name: str, distribution: str, dtype: torch.dtype
) -> None:
    exact, plain, ours = [], [], []
    for seed in range(4):
        model = gated(name, dtype, seed, distribution=distribution)
        scatter_gates_(model, 0.7, seed)
        exact.append(logits(copy.deepcopy(model).double()))
        plain.append(logits(model))
        ours.append(logits(prune_(model)))
    assert_models_no_worse(ours, plain, exact)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("bert", "roberta")])
@pytest.mark.parametrize("distribution", ALL)
def test_generate_token_for_token(name: str, distribution: str) -> None:
    model = gated(name, torch.float32, distribution=distribution)
    scatter_gates_(model, 0.7)
    prompt = inputs(batch=2, length=5)["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "use_cache": True}
    expected = model.generate(prompt, **options)
    assert expected.shape == (2, 29)
    assert len(expected[:, 5:].unique()) > 3, "a model that repeats itself proves little"
    prune_(model)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert torch.equal(model.generate(prompt, **{**options, "use_cache": False}), expected)


@settings(max_examples=40)
@given(st.data())
@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_random_patterns(name: str, data: st.DataObject) -> None:
    """Any pattern: whole layers closed, single survivors, nothing closed."""
    model = gated(
        name,
        tie=data.draw(st.sampled_from(["unit", "none"])),
        distribution=data.draw(st.sampled_from(ALL)),
    )
    gates = GateMap(model)
    pattern = {}
    for gate in gates.gates():
        count = gate.logits.numel()
        kind = data.draw(st.sampled_from(["open", "closed", "one", "random", "random"]))
        mask = torch.zeros(count, dtype=torch.bool)
        if kind == "open":
            mask[:] = True
        elif kind == "one":
            mask[data.draw(st.integers(0, count - 1))] = True
        elif kind == "random":
            bits = data.draw(st.integers(0, 2**count - 1))
            mask = torch.tensor([bool(bits >> i & 1) for i in range(count)])
        pattern[id(gate)] = mask
    close_(model, pattern)
    expected = alive_by_definition(model, open_gates(gates))
    removal = gates.removal()
    names = list(gates.linears)
    assert_exact(model)
    for name in names:
        layer = model.get_submodule(name)
        rows, columns = expected[Side(name, "row")], expected[Side(name, "column")]
        assert tuple(layer.weight.shape) == (int(rows.sum()), int(columns.sum()))
        if isinstance(layer, PrunedLinear) and layer.rows is not None:
            assert torch.equal(layer.rows.long(), rows.nonzero().squeeze(1))
        if isinstance(layer, PrunedLinear) and layer.columns is not None:
            assert torch.equal(layer.columns.long(), columns.nonzero().squeeze(1))
    left = sum(model.get_submodule(n).weight.numel() for n in names)
    assert removal.removed == removal.total - left


@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
@pytest.mark.parametrize("kept", [None, 0])
@pytest.mark.parametrize("tie", ["unit", "none"])
def test_everything_closed(name: str, kept: int | None, tie: str) -> None:
    """All closed, or one unit kept everywhere: still a model, still exact."""
    model = gated(name, tie=tie)
    gates = GateMap(model)
    survivor = -1 if kept is None else kept
    masks = {id(g): torch.arange(g.logits.numel()) == survivor for g in gates.gates()}
    close_(model, masks)
    if kept is None:
        assert gates.removal().fraction == 1.0
    assert_exact(model)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_nothing_closed_leaves_plain_linears(name: str) -> None:
    model = gated(name)
    before = logits(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "logits" not in n}
    prune_(model)
    assert torch.equal(logits(model), before)
    assert not any(isinstance(m, PrunedLinear) for m in model.modules())
    for n, weight in weights.items():
        assert torch.equal(model.get_parameter(n), weight)


@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_mlp_inside_is_compact_and_attention_keeps_its_width(name: str) -> None:
    model = gated(name)
    scatter_gates_(model, 0.6)
    prune_(model)
    inner = {"bert": ("intermediate.dense",), "llama-gqa": ("mlp.gate_proj", "mlp.up_proj")}[name]
    outer = {"bert": "output.dense", "llama-gqa": "mlp.down_proj"}[name]
    layers = [
        (prefix, module)
        for prefix, module in model.named_modules()
        if prefix.endswith(outer) and "attention" not in prefix
    ]
    assert len(layers) == 2
    for prefix, down in layers:
        assert isinstance(down, PrunedLinear)
        assert down.columns is None
        assert down.in_features == down.weight.shape[1] < 20
        for n in inner:
            up = model.get_submodule(prefix.removesuffix(outer) + n)
            assert up.rows is None
            assert up.out_features == down.in_features
            assert up.in_features == 24
    for prefix, module in model.named_modules():
        if isinstance(module, PrunedLinear) and ("attention" in prefix or "attn" in prefix):
            assert module.out_features in (24, 12)
            assert module.in_features == 24


PROJECTIONS = [f"*{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@pytest.mark.parametrize("pattern", [*PROJECTIONS, "*.0.*", "*self_attn*"])
@pytest.mark.parametrize("tie", ["unit", "none"])
def test_ungated_partners_lose_what_their_gated_side_closed(pattern: str, tie: str) -> None:
    model = gate_(build("llama").double(), GateConfig(modules=(pattern,), tie=tie))
    scatter_gates_(model, 0.5)
    gates = GateMap(model)
    expected = alive_by_definition(model, open_gates(gates))
    names = list(gates.linears)
    assert_exact(model)
    for name in names:
        shape = tuple(int(expected[Side(name, axis)].sum()) for axis in ("row", "column"))
        assert tuple(model.get_submodule(name).weight.shape) == shape


def test_untouched_linears_stay_the_same_objects() -> None:
    model = gate_(build("llama"), GateConfig(modules=("*.0.*",)))
    scatter_gates_(model, 0.5)
    others = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    frozen = {n: p.requires_grad for n, p in model.named_parameters()}
    prune_(model)
    for name, module in others.items():
        assert model.get_submodule(name) is module
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.requires_grad == frozen[name], name


def test_partner_of_another_class_is_not_coupled() -> None:
    """A subclass of nn.Linear may compute anything: its rows and columns stay."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x) + 1.0

    model = build("llama", layers=1).double()
    up = model.model.layers[0].mlp.up_proj
    doubled = Doubled(up.in_features, up.out_features, bias=False).double()
    model.model.layers[0].mlp.up_proj = doubled
    gate_(model, GateConfig(modules=("*.mlp.gate_proj", "*.mlp.down_proj"), tie="none"))
    scatter_gates_(model, 0.5)
    assert_exact(model)
    assert model.model.layers[0].mlp.up_proj is doubled


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_output_embedding_on_request(tied: bool, model_type: str) -> None:
    """Pruning a tied lm_head unties it: the input embedding stays whole."""
    model = build(model_type, tie_word_embeddings=tied).double()
    head = "lm_head" if model_type == "llama" else "cls.predictions.decoder"
    assert (model.get_input_embeddings().weight is model.get_submodule(head).weight) == tied
    gate_(model, GateConfig(modules=(head, "*.0.*")))
    scatter_gates_(model, 0.6)
    embedding = model.get_input_embeddings().weight.detach().clone()
    assert_exact(model)
    assert isinstance(model.get_submodule(head), PrunedLinear)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert model.config.tie_word_embeddings is False
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)


def test_other_shared_weights_leave_the_config_alone() -> None:
    """Two layers that share a weight are no output embedding; a model may have no config at all."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[1].weight = model[0].weight
    gate_(model, GateConfig(modules=("0",)))
    with torch.no_grad():
        model[0].row_gate.logits[1] = -1.0
    x = torch.randn(3, 4)
    before = model(x)
    torch.testing.assert_close(prune_(model)(x), before)
    assert model[1].weight.shape == (4, 4)


@pytest.mark.parametrize("tie", ["unit", "none"])
def test_tied_embeddings_stay_tied_when_the_head_is_not_gated(tie: str) -> None:
    model = gated("llama-tied", tie=tie)
    scatter_gates_(model, 0.6)
    assert_exact(model)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_uncoupled_chain_keeps_both_sides_width() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    gate_(model, GateConfig(modules=("*",)))
    with torch.no_grad():
        model[0].row_gate.logits[1] = -1.0
        model[2].column_gate.logits[3] = -1.0
    x = torch.randn(3, 6, dtype=torch.float64)
    before = model(x)
    prune_(model)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert model[0].rows.tolist() == [0, 2, 3, 4]
    assert model[2].columns.tolist() == [0, 1, 2, 4]
    assert (model[0].out_features, model[2].in_features) == (5, 5)


@pytest.mark.parametrize("train_weight", [True, False])
@pytest.mark.parametrize("train_bias", [True, False])
def test_trainability_and_mode_are_kept(train_weight: bool, train_bias: bool) -> None:
    model = gate_(
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)),
        GateConfig(modules=("*",), train_weight=train_weight, train_bias=train_bias),
    )
    with torch.no_grad():
        model[0].row_gate.logits[1] = -1.0
    model.train()
    model[1].eval()
    prune_(model)
    assert [m.training for m in model] == [True, False]
    for layer in model:
        assert layer.weight.requires_grad is train_weight
        assert layer.bias.requires_grad is train_bias


def test_pruned_model_can_be_trained_on() -> None:
    model = gated("llama-gqa", torch.float32, train_weight=True)
    scatter_gates_(model, 0.6)
    prune_(model)
    model.train()
    batch = inputs()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    layer = next(m for m in model.modules() if isinstance(m, PrunedLinear))
    assert layer.weight.requires_grad


def test_fold_rounds_once() -> None:
    """r ⊙ w ⊙ c in fp32, then to the weight's dtype: at most half an ulp off, elementwise."""
    model = gate_(
        nn.Sequential(nn.Linear(64, 48)).bfloat16(),
        GateConfig(modules=("*",), distribution="gaussian"),
    )
    layer = model[0]
    with torch.no_grad():
        for gate in (layer.row_gate, layer.column_gate):
            gate.logits.uniform_(-0.4, 0.4)
    r, c = (g.value().bfloat16().double().detach() for g in (layer.row_gate, layer.column_gate))
    exact = layer.weight.detach().double() * r[:, None] * c
    prune_(model)
    ulp = exact.abs().log2().floor().exp2() * torch.finfo(torch.bfloat16).eps
    error = (model[0].weight.detach().double() - exact).abs()
    assert (error <= 0.5 * ulp * (1 + 1e-4)).all()


@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
def test_training_mode_prunes_the_evaluation_gates(distribution: str) -> None:
    model = gated("bert", distribution=distribution)
    scatter_gates_(model, 0.6)
    before = logits(model)
    model.train()
    prune_(model)
    assert relative_difference(logits(model.eval()), before) <= 1e-10


def test_prune_twice_and_ungated_are_refused() -> None:
    with pytest.raises(ValueError, match="no FusedGatedLinear"):
        prune_(nn.Sequential(nn.Linear(2, 2)))
    model = gated("llama-gqa")
    prune_(model)
    with pytest.raises(ValueError, match="no FusedGatedLinear"):
        prune_(model)


def test_bare_gated_layer_is_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match="put it in a container"):
        prune_(FusedGatedLinear(3, 3))


def test_returns_the_same_model_and_draws_nothing() -> None:
    model = gated("llama-gqa", distribution="gaussian")
    state = torch.random.get_rng_state()
    assert prune_(model) is model
    assert torch.equal(torch.random.get_rng_state(), state)


def test_record_holds_every_pruned_layer() -> None:
    model = gated("llama-gqa")
    scatter_gates_(model, 0.6)
    prune_(model)
    record = model.config.quantization_config
    assert record["state"] == "pruned"
    pruned = {n: m for n, m in model.named_modules() if isinstance(m, PrunedLinear)}
    assert record["modules"].keys() == pruned.keys()
    for name, fields in record["modules"].items():
        twin = PrunedLinear(**fields, device="meta", dtype=torch.float64)
        shapes = {n: t.shape for n, t in pruned[name].state_dict().items()}
        assert {n: t.shape for n, t in twin.state_dict().items()} == shapes


def test_closed_column_never_reads_its_input() -> None:
    """What a pruned layer drops may hold anything; the gated layer multiplies it by 0."""
    model = gate_(nn.Sequential(nn.Linear(4, 3)), GateConfig(modules=("*",)))
    with torch.no_grad():
        model[0].column_gate.logits[2] = -1.0
    x = torch.randn(2, 4)
    expected = prune_(model)(x)
    x[:, 2] = math.inf
    assert torch.equal(model(x), expected)


def test_vocabulary_is_what_the_tests_think() -> None:
    assert logits(build("llama", layers=1)).shape == (3, 9, VOCABULARY)
