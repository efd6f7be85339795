"""Gates-only checkpoints: what gate_ trains, beside an untouched base model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finegates import FusedGatedLinear, Gate, GateConfig, GateMap, gate_
from priced import by_latency

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("finegates.hf")

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 400,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
IDS = torch.tensor([[5, 9, 13, 7, 30, 2], [8, 21, 6, 33, 4, 2]])
LOGITS = "bert.encoder.layer.0.attention.self.query.column_gate.logits"


def base_model(llama: bool = False) -> Any:
    torch.manual_seed(0)
    if llama:
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config).eval()
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()


def trained(base: Any, config: GateConfig | None = None) -> Any:
    """Return a gated copy whose trainable parameters have all moved."""
    model = gate_(copy.deepcopy(base), config or GateConfig(distribution="gaussian"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def output(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    ours = dict(model.named_parameters())
    theirs = dict(loaded.named_parameters())
    assert theirs.keys() == ours.keys()
    for name, parameter in ours.items():
        assert torch.equal(theirs[name], parameter)
        assert theirs[name].requires_grad == parameter.requires_grad
    assert torch.equal(output(loaded), output(model))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Let ``change`` edit a stored JSON object or a stored dict of tensors."""
    if path.suffix == ".json":
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


@pytest.mark.parametrize("llama", [False, True], ids=["bert", "llama"])
@pytest.mark.parametrize("tie", ["unit", "none"])
def test_round_trip(tie: str, llama: bool, tmp_path: Path) -> None:
    base = base_model(llama)
    model = trained(base, GateConfig(distribution="gaussian", tie=tie))
    hf.save_gates(model, tmp_path / "first")
    loaded = hf.load_gates(copy.deepcopy(base), tmp_path / "first")
    assert_same(loaded, model)
    assert loaded.config.quantization_config == model.config.quantization_config
    hf.save_gates(loaded, tmp_path / "second")
    for file in ("gate_config.json", "gates.safetensors"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


def test_costs_come_back_with_the_gates(tmp_path: Path) -> None:
    base = base_model()
    config = by_latency(base)
    hf.save_gates(trained(base, config), tmp_path)
    loaded = GateMap(hf.load_gates(copy.deepcopy(base), tmp_path))
    assert next(iter(loaded.layers.values())).config.costs == config.costs
    assert loaded.project_(0.3).fraction == pytest.approx(0.3, abs=0.02)


def test_only_what_is_trained_is_stored(tmp_path: Path) -> None:
    model = trained(base_model())
    hf.save_gates(model, tmp_path)
    stored = load_file(tmp_path / "gates.safetensors")
    assert stored.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert (tmp_path / "gates.safetensors").stat().st_size < 16_000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gate_config.json",
        "gates.safetensors",
    ]


def test_logits_only(tmp_path: Path) -> None:
    base = base_model()
    model = trained(base)
    hf.save_gates(model, tmp_path, logits_only=True)
    loaded = hf.load_gates(copy.deepcopy(base), tmp_path)
    for name, parameter in loaded.named_parameters():
        expected = model if name.endswith(".logits") else base
        assert torch.equal(parameter, expected.get_parameter(name))


def test_loading_into_a_gated_model(tmp_path: Path) -> None:
    base = base_model()
    model = trained(base)
    hf.save_gates(model, tmp_path)
    loaded = trained(base, GateConfig(distribution="gaussian", sparsity=0.2))
    assert hf.load_gates(loaded, tmp_path) is loaded
    assert_same(loaded, model)


def test_half_precision_keeps_the_logits(tmp_path: Path) -> None:
    base = base_model()
    model = trained(base)
    hf.save_gates(model, tmp_path)
    loaded = hf.load_gates(copy.deepcopy(base).bfloat16(), tmp_path)
    for name, parameter in model.named_parameters():
        stored = loaded.get_parameter(name)
        if name.endswith(".logits"):
            assert torch.equal(stored, parameter)
        elif parameter.requires_grad:
            assert torch.equal(stored, parameter.bfloat16())


def test_any_module_has_gates_to_save(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    model = gate_(copy.deepcopy(base), GateConfig(modules=("*",)))
    hf.save_gates(model, tmp_path)
    loaded = hf.load_gates(base, str(tmp_path))
    assert all(isinstance(layer, FusedGatedLinear) for layer in loaded)
    x = torch.randn(3, 5)
    assert torch.equal(loaded(x), model(x))


def test_pruned_layers_stay_beside_the_gates(tmp_path: Path) -> None:
    from finegates import prune_

    base = gate_(base_model(), GateConfig(modules=("*.layer.0.*",)))
    for gate in base.modules():
        if isinstance(gate, Gate):
            gate.logits.data.normal_()
    model = trained(prune_(base), GateConfig(modules=("*.layer.1.*",)))
    hf.save_gates(model, tmp_path)
    assert_same(hf.load_gates(base, tmp_path), model)


def test_an_interrupted_save_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf.save_gates(trained(base_model()), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = Path.write_bytes

    def fail_on_config(path: Path, data: bytes) -> int:
        if "json" in path.name:
            write(path, data[:10])
            raise OSError("No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fail_on_config)
    with pytest.raises(OSError, match="No space"):
        hf.save_gates(trained(base_model()), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_needs_gates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model has no FusedGatedLinear"):
        hf.save_gates(base_model(), tmp_path)
    mixed = nn.Sequential(
        FusedGatedLinear(2, 2, config=GateConfig()),
        FusedGatedLinear(2, 2, config=GateConfig(sparsity=0.1)),
    )
    with pytest.raises(ValueError, match="one GateConfig, got 2"):
        hf.save_gates(mixed, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gate_config\.json"):
        hf.load_gates(base_model(), tmp_path)
    hf.save_gates(trained(base_model()), tmp_path)
    (tmp_path / "gates.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"gates\.safetensors"):
        hf.load_gates(base_model(), tmp_path)


CONFIG, WEIGHTS = "gate_config.json", "gates.safetensors"
DAMAGE: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "field": (CONFIG, lambda c: c.update(tie="knot"), r"json: tie must be .* got 'knot'"),
    "version": (CONFIG, lambda c: c.update(version=7), r"json: version must be .* got 7"),
    "overflow": (CONFIG, lambda c: c.update(sigma=10**400), r"json: "),
    "modules-none": (CONFIG, lambda c: c.update(modules=None), r"json: modules must name"),
    "modules-empty": (CONFIG, lambda c: c.update(modules=[]), r"json: modules must not be empty"),
    "modules-unknown": (
        CONFIG,
        lambda c: c["modules"].append("bert.spam"),
        r"json: modules: pattern 'bert\.spam' matches no",
    ),
    "modules-fewer": (
        CONFIG,
        lambda c: c["modules"].remove("bert.encoder.layer.0.output.dense"),
        r"safetensors: 'bert.encoder.layer.0.output.dense.column_gate.logits' is no parameter",
    ),
    "ties": (CONFIG, lambda c: c.update(tie="none"), r"safetensors: .*\.logits is missing"),
    "logits-gone": (WEIGHTS, lambda t: t.pop(LOGITS), r"safetensors: .*\.logits is missing"),
    "logits-shape": (
        WEIGHTS,
        lambda t: t.update({LOGITS: torch.ones(3)}),
        r"column_gate\.logits must be .* \(16,\), got torch\.float32 of shape \(3,\)",
    ),
    "logits-int": (
        WEIGHTS,
        lambda t: t.update({LOGITS: torch.ones(16, dtype=torch.int32)}),
        r"column_gate\.logits must be .* got torch\.int32",
    ),
    "head-shape": (
        WEIGHTS,
        lambda t: t.update({"classifier.bias": torch.ones(5)}),
        r"classifier\.bias must be .* \(2,\), got torch\.float32 of shape \(5,\)",
    ),
    "unknown": (WEIGHTS, lambda t: t.update({"spam": torch.ones(1)}), "'spam' is no parameter"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_leaves_the_model_alone(case: str, tmp_path: Path) -> None:
    file, change, message = DAMAGE[case]
    base = base_model()
    hf.save_gates(trained(base), tmp_path)
    edit(tmp_path / file, change)
    before = {name: p.clone() for name, p in base.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        hf.load_gates(base, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / file.partition(".")[0][:4]) in str(caught.value)
    assert not any(isinstance(module, Gate) for module in base.modules())
    assert not hasattr(base.config, "quantization_config")
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"modules": ', "\udcff"])
def test_broken_json(text: str, tmp_path: Path) -> None:
    hf.save_gates(trained(base_model()), tmp_path)
    (tmp_path / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"gate_config\.json") as caught:
        hf.load_gates(base_model(), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 2000])
def test_truncated_file(kept: int, tmp_path: Path) -> None:
    hf.save_gates(trained(base_model()), tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"gates\.safetensors: not a readable") as caught:
        hf.load_gates(base_model(), tmp_path)
    assert "\n" not in str(caught.value)


def test_gates_of_another_meaning_are_refused(tmp_path: Path) -> None:
    base = base_model()
    hf.save_gates(trained(base), tmp_path)
    model = trained(base, GateConfig(distribution="ranking"))
    with pytest.raises(ValueError, match="distribution must be 'ranking', .* got 'gaussian'"):
        hf.load_gates(model, tmp_path)
