"""LoRA inside the gates: the formula, its gradients, and the removal that folds it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForMaskedLM

import finegates.hf
from finegates import FusedGatedLinear, GateConfig, PrunedLinear, gate_, prune_
from finegates.nn import LoRA
from numerics import assert_no_worse, relative_difference
from tiny_models import build, logits, scatter_gates_

ALL = ("ranking", "gaussian", "hard_concrete")
N, K, RANK = 9, 7, 3


def layer_with_lora(dtype: torch.dtype = torch.float64, **changes: Any) -> FusedGatedLinear:
    """A layer with closed, open and fractional gates and a LoRA far from its start."""
    torch.manual_seed(3)
    config = GateConfig(lora_rank=RANK, lora_alpha=6.0, **changes)
    layer = FusedGatedLinear(K, N, dtype=dtype, config=config)
    fill_lora_(layer)
    with torch.no_grad():
        for gate in (layer.row_gate, layer.column_gate):
            if gate is not None:
                gate.logits.normal_(config.closing_logit + 0.4, 0.6)
                gate.logits[0] = config.closing_logit - 0.5
                gate.logits[1] = config.closing_logit + 0.3
    return layer.eval()


def fill_lora_(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRA):
                for factor in (module.down, module.up):
                    factor.copy_(0.4 * torch.randn(factor.shape, generator=generator))


def by_formula(layer: FusedGatedLinear, x: Tensor) -> Tensor:
    """r ⊙ ((x ⊙ c)(w + s B A)ᵀ + b), the update built whole."""
    assert layer.lora is not None
    assert layer.row_gate is not None
    assert layer.column_gate is not None
    w = layer.weight + 6.0 / RANK * (layer.lora.up @ layer.lora.down)
    return layer.row_gate() * F.linear(x * layer.column_gate(), w, layer.bias)


@pytest.mark.parametrize("distribution", ALL)
def test_formula_and_every_gradient(distribution: str) -> None:
    layer = layer_with_lora(distribution=distribution)
    twin = copy.deepcopy(layer)
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(5, N, dtype=torch.float64)
    (y := layer(x)).backward(dy)
    dx, x.grad = x.grad, None
    (expected := by_formula(twin, x)).backward(dy)
    assert relative_difference(y, expected) <= 1e-12
    assert dx is not None
    assert x.grad is not None
    assert relative_difference(dx, x.grad) <= 1e-12
    theirs = dict(twin.named_parameters())
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        # Logits are fp32.
        tolerance = 1e-5 if name.endswith("logits") else 1e-12
        assert relative_difference(parameter.grad, theirs[name].grad) <= tolerance, name
    assert y[:, 0].abs().max() == 0, "the first row is closed"


@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
def test_one_sample_serves_both_paths(distribution: str) -> None:
    layer = layer_with_lora(distribution=distribution).train()
    x = torch.randn(5, K, dtype=torch.float64)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    assert relative_difference(y, by_formula(layer, x)) <= 1e-12


def test_a_fresh_lora_changes_no_bit_and_starts_as_in_peft() -> None:
    torch.manual_seed(0)
    plain = FusedGatedLinear(64, 32)
    torch.manual_seed(0)
    layer = FusedGatedLinear(64, 32, config=GateConfig(lora_rank=RANK))
    x = torch.randn(4, 64)
    assert torch.equal(layer(x), plain(x))
    assert layer.lora is not None
    assert layer.lora.up.abs().max() == 0
    # Kaiming-uniform with a = √5 is uniform within ± 1 / √K.
    assert 0.9 / 8 < layer.lora.down.abs().max() <= 1 / 8
    assert layer.lora.scale == 8.0 / RANK


def test_dropout_is_on_the_input_of_the_update_alone() -> None:
    layer = layer_with_lora(lora_dropout=0.5).train()
    x = torch.randn(5, K, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    assert relative_difference(layer.eval()(x), by_formula(layer, x)) <= 1e-12
    nn.init.zeros_(layer.lora.up)
    assert torch.equal(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_one_sided_gates(side: str) -> None:
    layer = layer_with_lora(**{side: False})
    assert layer.lora is not None
    x = torch.randn(5, K, dtype=torch.float64)
    w = layer.weight + layer.lora.delta()
    r = torch.ones(N) if layer.row_gate is None else layer.row_gate()
    c = torch.ones(K) if layer.column_gate is None else layer.column_gate()
    assert relative_difference(layer(x), r * F.linear(x * c, w, layer.bias)) <= 1e-12


@pytest.mark.parametrize("distribution", ALL)
def test_checkpointing_recomputes_the_same(distribution: str) -> None:
    layer = layer_with_lora(distribution=distribution, lora_dropout=0.3).train()
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(2)
        layer.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiles_whole() -> None:
    torch.compiler.reset()
    layer = layer_with_lora()
    x = torch.randn(5, K, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.compiler.reset()


def test_autocast_and_half_precision() -> None:
    """Factors stay fp32 beside a bf16 weight; the result is as good as plain bf16 arithmetic."""
    layer = layer_with_lora(torch.bfloat16)
    assert layer.lora is not None
    assert layer.lora.down.dtype == torch.float32
    x = torch.randn(64, K).bfloat16()
    exact = by_formula(copy.deepcopy(layer).double(), x.double())
    w = layer.weight + layer.lora.delta().bfloat16()
    plain = layer.row_gate().bfloat16() * F.linear(
        x * layer.column_gate().bfloat16(), w, layer.bias
    )
    assert_no_worse(layer(x), plain, exact)
    layer = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    assert_no_worse(y, plain, exact)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("tie", ["unit", "none"])
def test_pruned_equals_gated(model_type: str, distribution: str, tie: str) -> None:
    config = GateConfig(lora_rank=RANK, distribution=distribution, tie=tie)
    model = gate_(build(model_type).double(), config)
    without = logits(model)
    fill_lora_(model)
    assert relative_difference(logits(model), without) > 0.1, "the update must matter"
    scatter_gates_(model, 0.7)
    gated = logits(model)
    prune_(model)
    assert relative_difference(logits(model), gated) <= 1e-10
    assert not any(isinstance(m, LoRA) for m in model.modules())
    assert any(isinstance(m, PrunedLinear) for m in model.modules())


@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pruned_is_no_worse_than_gated(distribution: str, dtype: torch.dtype) -> None:
    config = GateConfig(lora_rank=RANK, distribution=distribution)
    model = gate_(build("llama").to(dtype), config)
    fill_lora_(model)
    scatter_gates_(model, 0.7)
    exact = logits(copy.deepcopy(model).double())
    plain = logits(model)
    assert_no_worse(logits(prune_(model)), plain, exact)


def test_what_is_trained() -> None:
    model = gate_(build("bert"), GateConfig(lora_rank=RANK))
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"logits", "bias", "down", "up"}


@pytest.mark.parametrize("logits_only", [False, True])
def test_gates_file_holds_the_factors(logits_only: bool, tmp_path: Path) -> None:
    config = GateConfig(lora_rank=RANK)
    model = gate_(build("bert"), config)
    fill_lora_(model)
    scatter_gates_(model, 0.7)
    finegates.hf.save_gates(model, tmp_path, logits_only=logits_only)
    loaded = finegates.hf.load_gates(build("bert"), tmp_path)
    factors = {n: p for n, p in model.named_parameters() if ".lora." in n}
    assert factors
    for name, factor in factors.items():
        assert torch.equal(loaded.get_parameter(name), factor) is not logits_only
    if not logits_only:
        assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="lora_rank must be 2, as in the model, got 3"):
        finegates.hf.load_gates(gate_(build("bert"), GateConfig(lora_rank=2)), tmp_path)


def test_from_pretrained_round_trip(tmp_path: Path) -> None:
    model = gate_(build("bert"), GateConfig(lora_rank=RANK))
    fill_lora_(model)
    scatter_gates_(model, 0.7)
    before = logits(model)
    model.save_pretrained(tmp_path / "gated")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "gated")
    assert torch.equal(logits(loaded), before)
    prune_(loaded).save_pretrained(tmp_path / "pruned")
    pruned = AutoModelForMaskedLM.from_pretrained(tmp_path / "pruned")
    torch.testing.assert_close(logits(pruned), before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_peft_models_are_refused_in_one_line() -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(build("bert"), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"query' is a Linear inside an adapter .*lora_rank"):
        gate_(wrapped)
    gate_(wrapped.merge_and_unload(), GateConfig(lora_rank=RANK))


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("lora_rank", -1, "a whole number from 0"),
        ("lora_rank", 2.0, "a whole number from 0"),
        ("lora_rank", True, "a whole number from 0"),
        ("lora_alpha", 0.0, "above 0"),
        ("lora_dropout", 1.0, r"in \[0, 1\)"),
        ("lora_learning_rate", 0.0, "above 0"),
    ],
)
def test_bad_fields(field: str, value: object, what: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be {what}, got {value!r}"):
        GateConfig(**{field: value})  # type: ignore[arg-type]
