"""Gated and pruned models through save_pretrained and from_pretrained, bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finegates import FusedGatedLinear, Gate, GateConfig, PrunedLinear, gate_, prune_

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("finegates.hf")

# A wide initialisation, so that a weight in the wrong place would show.
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 1,
}
LLAMA = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
MODELS: dict[str, Callable[[], Any]] = {
    "bert-classifier": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES)
    ),
    "bert-masked-lm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
    "roberta-classifier": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**SIZES)
    ),
    "roberta-masked-lm": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**SIZES)
    ),
    "llama-lm": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "llama-lm-tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    ),
    "llama-classifier": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**LLAMA, attention_bias=True)
    ),
}
IDS = torch.tensor([[5, 9, 13, 7, 30, 2], [8, 21, 6, 33, 4, 2]])


def make(name: str, config: GateConfig | None = None, state: str = "gated") -> Any:
    """Return a model with about half of its gates closed; tied and fractional by default."""
    torch.manual_seed(0)
    model = gate_(MODELS[name](), config or GateConfig(distribution="gaussian")).eval()
    with torch.no_grad():
        for gate in model.modules():
            if isinstance(gate, Gate):
                gate.logits.normal_(-0.5)
    return prune_(model) if state == "pruned" else model


def output(model: Any) -> Tensor:
    """Return the logits, or a bare encoder's last hidden state."""
    with torch.no_grad():
        result: Tensor = model(IDS)[0]
    return result


def assert_same(loaded: Any, model: Any) -> None:
    """Assert equal outputs, tensors, dtypes, ties and records."""
    torch.testing.assert_close(output(loaded), output(model), rtol=0, atol=0)
    theirs, ours = loaded.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor)
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert loaded.config.quantization_config == model.config.quantization_config


def rewrite_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let ``change`` edit the record in config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Let ``change`` edit the stored tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("state", ["gated", "pruned"])
@pytest.mark.parametrize("tie", ["unit", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, tie: str, state: str, tmp_path: Path) -> None:
    model = make(name, GateConfig(distribution="gaussian", tie=tie), state)
    model.save_pretrained(tmp_path / "first")
    loaded, info = type(model).from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info.values())
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "second")
    records = [(tmp_path / time / "config.json").read_text() for time in ("first", "second")]
    assert records[0] == records[1]
    assert_same(type(model).from_pretrained(tmp_path / "second"), model)
    if state == "gated":
        trainable = {n: p.requires_grad for n, p in model.named_parameters()}
        assert {n: p.requires_grad for n, p in loaded.named_parameters()} == trainable
    else:
        assert any(isinstance(module, PrunedLinear) for module in loaded.modules())


def test_tied_gates_are_saved_once(tmp_path: Path) -> None:
    model = make("bert-classifier")
    model.save_pretrained(tmp_path)
    stored = {name for name in load_file(tmp_path / "model.safetensors") if "logits" in name}
    assert stored == {name for name, _ in model.named_parameters() if "logits" in name}
    loaded = type(model).from_pretrained(tmp_path)
    attention = loaded.bert.encoder.layer[0].attention.self
    assert attention.query.column_gate.logits is attention.value.column_gate.logits
    assert loaded.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("config", [
    GateConfig(tie="none", rows=False),
    GateConfig(columns=False, train_bias=False, trainable=()),
    GateConfig(distribution="hard_concrete", train_weight=True),
    GateConfig(modules=("bert.encoder.layer.1.*", "classifier")),
], ids=["columns", "rows", "hard-concrete", "patterns"])  # fmt: skip
@pytest.mark.parametrize("state", ["gated", "pruned"])
def test_every_config_round_trips(config: GateConfig, state: str, tmp_path: Path) -> None:
    model = make("bert-classifier", config, state)
    model.save_pretrained(tmp_path)
    assert_same(type(model).from_pretrained(tmp_path), model)


@pytest.mark.parametrize("state", ["gated", "pruned"])
@pytest.mark.parametrize("name", ["llama-lm-tied", "bert-masked-lm"])
def test_gated_output_embedding_round_trips(name: str, state: str, tmp_path: Path) -> None:
    head = "lm_head" if name.startswith("llama") else "cls.predictions.decoder"
    model = make(name, GateConfig(modules=("*layer*", head)), state)
    model.save_pretrained(tmp_path)
    assert_same(type(model).from_pretrained(tmp_path), model)


@pytest.mark.parametrize("state", ["gated", "pruned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_is_honoured(
    saved: torch.dtype, dtype: torch.dtype, state: str, tmp_path: Path
) -> None:
    model = make("llama-lm", state=state).to(saved)
    model.save_pretrained(tmp_path)
    assert_same(type(model).from_pretrained(tmp_path), model)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    for name, tensor in model.state_dict().items():
        fixed = name.endswith((".logits", ".rows", ".columns"))
        expected = tensor if fixed else tensor.to(dtype)
        assert loaded.state_dict()[name].dtype == expected.dtype
        assert torch.equal(loaded.state_dict()[name], expected)
    assert output(loaded).dtype == dtype


@pytest.mark.parametrize("state", ["gated", "pruned"])
def test_generation_is_the_same_token_for_token(state: str, tmp_path: Path) -> None:
    model = make("llama-lm-tied", state=state)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    expected = model.generate(IDS, attention_mask=mask, use_cache=False, **arguments)
    generated = loaded.generate(IDS, attention_mask=mask, use_cache=True, **arguments)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("state", ["gated", "pruned"])
def test_shards(state: str, tmp_path: Path) -> None:
    model = make("roberta-classifier", state=state)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(type(model).from_pretrained(tmp_path), model)


@pytest.mark.parametrize("state", ["gated", "pruned"])
def test_device_map(state: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = make("llama-lm", state=state)
    model.save_pretrained(tmp_path)
    assert_same(type(model).from_pretrained(tmp_path, device_map="cpu"), model)


@pytest.mark.parametrize("state", ["gated", "pruned"])
def test_a_loaded_model_casts_like_any_other(state: str, tmp_path: Path) -> None:
    make("bert-classifier", state=state).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not loaded.is_quantized
    before = {n: t.clone() for n, t in loaded.state_dict().items() if n.endswith(".logits")}
    for cast in (loaded.half, loaded.float, loaded.bfloat16, loaded.double):
        cast()
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype != torch.int64
            assert name not in before or torch.equal(tensor, before[name])
    assert output(loaded).dtype == torch.float64


@pytest.mark.parametrize("state", ["gated", "pruned"])
@pytest.mark.parametrize("name", ["bert-classifier", "llama-lm"])
def test_base_model_and_heads_exchange_checkpoints(name: str, state: str, tmp_path: Path) -> None:
    model = make(name, state=state)
    model.save_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(output(base), output(model.base_model))
    base.save_pretrained(tmp_path / "base")
    assert_same(transformers.AutoModel.from_pretrained(tmp_path / "base"), base)
    headed = type(model).from_pretrained(tmp_path / "base")
    assert torch.equal(output(headed.base_model), output(base))
    assert headed.config.quantization_config == model.config.quantization_config


def test_pruning_a_loaded_gated_model(tmp_path: Path) -> None:
    model = make("llama-classifier")
    model.save_pretrained(tmp_path / "gated")
    loaded = prune_(type(model).from_pretrained(tmp_path / "gated"))
    assert_same(loaded, prune_(model))
    loaded.save_pretrained(tmp_path / "pruned")
    assert_same(type(model).from_pretrained(tmp_path / "pruned"), model)


def test_gating_a_pruned_model_again(tmp_path: Path) -> None:
    model = make("bert-classifier", GateConfig(modules=("*.layer.0.*",)), "pruned")
    gate_(model, GateConfig(modules=("*.layer.1.*",)))
    model.save_pretrained(tmp_path)
    assert_same(type(model).from_pretrained(tmp_path), model)


def test_a_model_with_every_gate_closed(tmp_path: Path) -> None:
    model = make("roberta-classifier", GateConfig())
    for gate in model.modules():
        if isinstance(gate, Gate):
            gate.logits.data.fill_(-1.0)
    prune_(model).save_pretrained(tmp_path)
    assert_same(type(model).from_pretrained(tmp_path), model)


def test_a_model_with_every_gate_open(tmp_path: Path) -> None:
    model = prune_(gate_(MODELS["llama-lm"](), GateConfig()).eval())
    model.save_pretrained(tmp_path)
    assert_same(type(model).from_pretrained(tmp_path), model)


def test_copies_save_too(tmp_path: Path) -> None:
    model = copy.deepcopy(make("bert-classifier"))
    model.save_pretrained(tmp_path)
    assert_same(type(model).from_pretrained(tmp_path), model)


@pytest.mark.parametrize("state", ["gated", "pruned"])
def test_trainer_trains_a_loaded_model(state: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    make("bert-classifier", state=state).save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    data = [{"input_ids": ids, "labels": i % 2} for i, ids in enumerate(IDS.repeat(4, 1))]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    before = copy.deepcopy(model.state_dict())
    transformers.Trainer(model, arguments, train_dataset=data).train()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed <= {
        n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    assert any(".encoder.layer.0." in name for name in changed)
    assert_same(type(model).from_pretrained(tmp_path / "run" / "checkpoint-2"), model.eval())
    first = tmp_path / "run" / "checkpoint-1"
    resumed = type(model).from_pretrained(tmp_path / "model")
    transformers.Trainer(resumed, arguments, train_dataset=data).train(str(first))
    assert_same(resumed.eval(), model)


def test_pipeline_serves_a_pruned_model(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "a", "fine", "gate"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]"
    )
    tokenizer.save_pretrained(tmp_path)
    model = make("bert-classifier", state="pruned")
    model.save_pretrained(tmp_path)
    (answer,) = transformers.pipeline("text-classification", model=str(tmp_path))("a fine gate")
    with torch.no_grad():
        expected = model(torch.tensor([[2, 3, 4]])).logits.softmax(-1).max().item()
    assert answer["score"] == pytest.approx(expected)


def test_registering_twice_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before = dict(AUTO_QUANTIZER_MAPPING)
    hf.quantizer.register()
    assert before == AUTO_QUANTIZER_MAPPING
    assert AUTO_QUANTIZER_MAPPING["finegates"] is hf.FineGatesQuantizer


def test_gates_are_not_put_in_by_from_pretrained(tmp_path: Path) -> None:
    MODELS["llama-lm"]().save_pretrained(tmp_path)
    config = hf.FineGatesConfig(version=1, state="pruned", modules={})
    with pytest.raises(ValueError, match="finegates does require the model to be pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


QUERY = "bert.encoder.layer.0.attention.self.query"
OUTPUT = "bert.encoder.layer.0.output.dense"


def set_field(name: str, field: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda record: record["modules"][name].update({field: value})


RECORDS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "version-new": ("pruned", lambda r: r.update(version=2), "version must be .* got 2"),
    "version-text": ("pruned", lambda r: r.update(version="1"), "version must be .* got '1'"),
    "version-none": ("pruned", lambda r: r.pop("version"), "version must be .* got None"),
    "state": ("pruned", lambda r: r.update(state="melted"), "state must be .* got 'melted'"),
    "state-type": ("pruned", lambda r: r.update(state=[1]), r"state must be .* got \[1\]"),
    "modules": ("pruned", lambda r: r.update(modules=[3]), r"modules must be .* got \[3\]"),
    "layer": ("pruned", lambda r: r["modules"].update({QUERY: 7}), "query'.* got 7"),
    "field-gone": (
        "pruned",
        lambda r: r["modules"][QUERY].pop("bias"),
        "query'.* bias, activation",
    ),
    "field-new": ("pruned", set_field(QUERY, "spin", 1), "query'.* got {.*spin"),
    "name": (
        "pruned",
        lambda r: r["modules"].update({"bert.spam": {}}),
        "'bert.spam', which is no",
    ),
    "name-empty": ("pruned", lambda r: r["modules"].update({"": {}}), "'', which is no"),
    "no-linear": ("pruned", lambda r: r["modules"].update({"bert": {}}), "'bert', which is no"),
    "rows": ("pruned", set_field(QUERY, "kept_rows", 17), r"query'\]\.kept_rows .* got 17"),
    "rows-less": ("pruned", set_field(QUERY, "kept_rows", -1), r"\.kept_rows .* got -1"),
    "rows-other": (
        "pruned",
        set_field(QUERY, "kept_rows", 1),
        r"query\.\w+ must have shape \(1,.* got \(\d",
    ),
    "rows-float": ("pruned", set_field(QUERY, "kept_rows", 2.0), r"\.kept_rows .* got 2\.0"),
    "rows-null": (
        "pruned",
        set_field(QUERY, "kept_rows", None),
        r"query\.\w+ must have shape \(16,.*got \(\d",
    ),
    "columns-bool": ("pruned", set_field(QUERY, "kept_columns", True), "kept_columns .* got True"),
    "size": ("pruned", set_field(QUERY, "out_features", 15), r"out_features .* got 15"),
    "size-huge": ("pruned", set_field(OUTPUT, "in_features", 10**15), "in_features .* got 1000"),
    "size-text": ("pruned", set_field(OUTPUT, "in_features", "16"), "in_features .* got '16'"),
    "bias": ("pruned", set_field(QUERY, "bias", False), "bias must be True, got False"),
    "bias-text": ("pruned", set_field(QUERY, "bias", "yes"), "bias must be True, got 'yes'"),
    "activation": ("pruned", set_field(QUERY, "activation", "sin"), "activation .* got 'sin'"),
    "gates-none": ("gated", lambda r: r.pop("gate_config"), "gate_config must be .* got None"),
    "gates-type": ("gated", lambda r: r.update(gate_config=[]), r"gate_config must be .* got \[\]"),
    "gates-field": (
        "gated",
        lambda r: r["gate_config"].update(sparsity=2),
        "gate_config: sparsity must be .* got 2",
    ),
    "gates-tie": ("gated", lambda r: r["gate_config"].update(tie=[]), r"tie must be .* got \[\]"),
    "gates-name": (
        "gated",
        lambda r: r["gate_config"]["modules"].append("bert.spam"),
        "'bert.spam', which is no",
    ),
    "gates-names": ("gated", lambda r: r["gate_config"].update(modules=None), "modules must name"),
    "gates-fewer": (
        "gated",
        lambda r: r["gate_config"]["modules"].remove(QUERY),
        r"query\.column_gate\.logits has no place",
    ),
    "layers-fewer": ("pruned", lambda r: r["modules"].pop(QUERY), r"query\.\w+ has no place"),
    "gates-version": ("gated", lambda r: r["gate_config"].update(version=9), "version .* got 9"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_bad_record(case: str, tmp_path: Path) -> None:
    state, change, message = RECORDS[case]
    model = make("bert-classifier", state=state)
    model.save_pretrained(tmp_path)
    rewrite_record(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        type(model).from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def set_rows(values: list[int], dtype: torch.dtype = torch.int32) -> Callable[[dict], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        rows = tensors[f"{QUERY}.rows"]
        tensors[f"{QUERY}.rows"] = torch.cat([torch.tensor(values), rows[len(values) :]]).to(dtype)

    return change


TENSORS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "range": ("pruned", set_rows([-1]), r"query\.rows must lie in \[0, 16\), got -1"),
    "range-high": (
        "pruned",
        lambda t: t[f"{QUERY}.rows"][-1:].fill_(16),
        r"query\.rows must lie in \[0, 16\), got 16",
    ),
    "unsorted": ("pruned", set_rows([9, 2]), r"query\.rows must be sorted .* got 2 after 9"),
    "twice": ("pruned", set_rows([0, 0]), r"query\.rows must be sorted .* got 0 after 0"),
    "int64": ("pruned", set_rows([], torch.int64), r"query\.rows must have dtype I32, got I64"),
    "float": ("pruned", set_rows([], torch.float32), r"query\.rows must have dtype I32, got F32"),
    "rows-gone": ("pruned", lambda t: t.pop(f"{QUERY}.rows"), r"query\.rows is missing"),
    "rows-more": (
        "pruned",
        lambda t: t.update({f"{QUERY}.rows": torch.arange(16, dtype=torch.int32)}),
        r"query\.rows must have shape \(\d+,\), got \(16,\)",
    ),
    "weight-shape": (
        "pruned",
        lambda t: t.update({f"{QUERY}.weight": torch.ones(2, 2)}),
        r"model\.safetensors: .*query\.weight must have shape .* got \(2, 2\)",
    ),
    "weight-int": (
        "pruned",
        lambda t: t.update({f"{QUERY}.bias": t[f"{QUERY}.bias"].long()}),
        r"query\.bias must have dtype a float type, got I64",
    ),
    "weight-gone": ("pruned", lambda t: t.pop(f"{QUERY}.weight"), r"query\.weight is missing"),
    "extra": (
        "pruned",
        lambda t: t.update({f"{QUERY}.scale": torch.ones(1)}),
        r"query\.scale has no place",
    ),
    "logits-shape": (
        "gated",
        lambda t: t.update({f"{QUERY}.column_gate.logits": torch.ones(3)}),
        r"query\.column_gate\.logits must have shape \(16,\), got \(3,\)",
    ),
    "logits-gone": (
        "gated",
        lambda t: t.pop(f"{QUERY}.column_gate.logits"),
        r"query\.column_gate\.logits is missing",
    ),
    "gated-weight-gone": ("gated", lambda t: t.pop(f"{QUERY}.weight"), r"query\.weight is missing"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_bad_tensors(case: str, tmp_path: Path) -> None:
    state, change, message = TENSORS[case]
    model = make("bert-classifier", state=state)
    model.save_pretrained(tmp_path)
    rewrite_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        type(model).from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_truncated_file(kept: float, tmp_path: Path) -> None:
    model = make("bert-classifier", state="pruned")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable") as caught:
        type(model).from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    model = make("bert-classifier", state="pruned")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: only safetensors are read"):
        type(model).from_pretrained(tmp_path)


def test_only_the_recorded_layers_are_gated(tmp_path: Path) -> None:
    model = make("bert-classifier", GateConfig(modules=("*.query",)))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    gated = [n for n, m in loaded.named_modules() if isinstance(m, FusedGatedLinear)]
    assert gated == [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
