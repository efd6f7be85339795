"""What is exported computes what the pruned model computes, without finegates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

from finegates import PrunedLinear, gate_, optimize_for_cpu
from finegates.export import dense_model, export_dense, export_onnx, export_openvino
from finegates.export.graph import _GATHER_COST, PlainLinear
from serving_case import pruned
from tiny_models import build, inputs, logits

FAMILIES = ("bert", "roberta", "llama")
SHAPES = ((3, 9), (1, 1), (2, 17))


@pytest.fixture(autouse=True)
def _gather_in_tiny_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiny layers gather their columns, as large ones do."""
    monkeypatch.setitem(_GATHER_COST, "onnx", 1)
    monkeypatch.setitem(_GATHER_COST, "openvino", 1)


@pytest.mark.parametrize("optimised", [False, True], ids=["pruned", "optimised"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_dense_model_has_the_configs_shapes(model_type: str, optimised: bool) -> None:
    model = pruned(model_type)
    before = logits(model)
    if optimised:
        optimize_for_cpu(model)
    dense = dense_model(model)
    reference = build(model_type)
    assert {n: p.shape for n, p in dense.named_parameters()} == {
        n: p.shape for n, p in reference.named_parameters()
    }
    assert not any(isinstance(m, PrunedLinear) for m in dense.modules())
    assert not hasattr(dense.config, "quantization_config")
    assert hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(dense), before)
    assert torch.equal(logits(model), logits(model))


def test_dense_checkpoint_loads_without_finegates(tmp_path: Path) -> None:
    model = pruned("bert")
    export_dense(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    code = (
        "import sys, torch; from transformers import AutoModelForMaskedLM;"
        f"model = AutoModelForMaskedLM.from_pretrained({str(tmp_path)!r});"
        "assert 'finegates' not in sys.modules;"
        "print(sum(p.numel() for p in model.parameters()))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(out.stdout) == sum(p.numel() for p in build("bert").parameters())
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"is gated; call prune_\(model\) first"):
        dense_model(gate_(build("bert")))
    with pytest.raises(TypeError, match="must have a transformers config, got Sequential"):
        dense_model(nn.Sequential(nn.Linear(2, 2)))
    model = pruned("bert")
    model.config.intermediate_size = 3
    with pytest.raises(ValueError, match=r"must fit the config's \(3, 24\)"):
        dense_model(model)


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize("cost", [0, 10**9], ids=["gathers", "multiplies-zeros"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_plain_linear(
    runtime: str, cost: int, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_GATHER_COST, runtime, cost)
    linear = nn.Linear(11, 9)
    layer = PrunedLinear.from_linear(
        linear, torch.tensor([1, 2, 8]), torch.tensor([0, 4, 5, 9]), activation
    ).eval()
    plain = PlainLinear(layer, runtime)
    assert plain.weight.shape == (3, 4 if cost == 0 else 11)
    x = torch.randn(2, 5, 11)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), layer(x))


def run_onnx(path: Path, values: dict[str, Tensor]) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path))
    feed = {name: value.numpy() for name, value in values.items()}
    return torch.from_numpy(session.run(["logits"], feed)[0])


def run_openvino(path: Path, values: dict[str, Tensor]) -> Tensor:
    runtime = pytest.importorskip("openvino")
    hints = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = runtime.Core().compile_model(str(path), "CPU", hints)
    return torch.from_numpy(compiled({n: v.numpy() for n, v in values.items()})["logits"])


GRAPHS = {"onnx": (export_onnx, run_onnx), "openvino": (export_openvino, run_openvino)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "runtime"),
    [
        ("bert", "onnx"),
        ("llama", "onnx"),
        ("roberta", "openvino"),
        ("bert", "openvino"),
        ("llama", "openvino"),
    ],
)
def test_graphs_compute_the_same(model_type: str, runtime: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    export, run = GRAPHS[runtime]
    model = pruned(model_type, layers=1)
    path = tmp_path / ("model.onnx" if runtime == "onnx" else "model.xml")
    export(model, path)
    assert not (tmp_path / "model.onnx.data").exists()
    optimize_for_cpu(model)
    for batch, length in SHAPES:
        values = inputs(batch=batch, length=length) if length > 4 else _unpadded(batch, length)
        if model_type != "llama":
            values["token_type_ids"] = torch.ones_like(values["input_ids"])
        with torch.no_grad():
            expected = model(**values).logits
        seen = values["attention_mask"].bool()
        torch.testing.assert_close(run(path, values)[seen], expected[seen], rtol=1e-4, atol=1e-4)


def _unpadded(batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(2, 61, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
