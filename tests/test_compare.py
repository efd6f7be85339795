"""Comparing methods: plans, every method on a tiny task, resuming, the table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM, Trainer

import tiny_text
from finegates import GateConfig, GateMap
from finegates.cli import main
from finegates.hf.trainer import GatedTrainer
from finegates.recipes import compare
from finegates.recipes.compare import read_plan
from finegates.recipes.experiment import Run, execute
from finegates.recipes.methods import METHODS, trainer_class
from finegates.recipes.text import file_documents, pack
from finegates.report import plot_spread, spread_table
from tiny_tasks import write_model, write_task

EXPERIMENTS = Path(__file__).parents[1] / "docs" / "experiments"
MODULES = ("attention.self.query", "attention.self.key", "attention.self.value",
           "attention.output.dense", "intermediate.dense", "output.dense")  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    write_model(root / "bert")
    write_task(root / "SST-2")
    return root


def plan(tiny: Path, path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    common = {
        "dataset": "glue:sst2", "model": str(tiny / "bert"), "max_steps": 4, "batch_size": 8,
        "max_length": 16, "learning_rate": 1e-3,
    }  # fmt: skip
    path.write_text(json.dumps({"common": common, "rows": rows}))
    return path


def compared(tiny: Path, path: Path, *more: str) -> list[dict[str, Any]]:
    assert main(["compare", str(path), "--data_dir", str(tiny), *more]) == 0
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


def prepared(tiny: Path, method: str, **gates: Any) -> tuple[Any, Any]:
    """Return the plain model and the one a method makes of it."""
    load = AutoModelForSequenceClassification.from_pretrained
    batches = [{"input_ids": torch.randint(5, 45, (4, 7))}]
    model = METHODS[method](load(tiny / "bert"), GateConfig(**gates), batches)
    return load(tiny / "bert"), model


def test_every_method_runs_and_is_counted(tiny: Path, tmp_path: Path) -> None:
    lines = compared(tiny, plan(tiny, tmp_path / "all.json", [{"method": list(METHODS)}]))
    assert [line["run"]["method"] for line in lines] == list(METHODS)
    found = {line["run"]["method"]: line for line in lines}
    for method in ("gates", "magnitude", "activation"):
        assert found[method]["removed"] == pytest.approx(0.4, abs=0.01)
    for method in ("dense", "head", "lora", "paper", "2:4"):
        assert found[method]["removed"] == 0.0
    trained = {method: line["trained"] for method, line in found.items()}
    biases = 2 * (4 * 48 + 96 + 48)
    assert trained["head"] == {"gates": 0, "lora": 0, "head": 98, "biases": biases, "weights": 0}
    assert trained["magnitude"] == trained["activation"] == trained["2:4"] == trained["head"]
    # Rank 8 on both sides of every Linear: 48 + 48 for attention's four, 48 + 96 for MLPs' two.
    assert trained["lora"] == {**trained["head"], "lora": 2 * 8 * (4 * 96 + 2 * 144)}
    # Per layer: query-key, value-output, neurons; columns of query-key-value and of the MLP's in;
    # rows of both outputs.
    assert trained["gates"] == {**trained["head"], "gates": 2 * (48 + 48 + 96 + 4 * 48)}
    assert trained["dense"]["weights"] > 10_000
    assert sum(trained["dense"].values()) == found["dense"]["parameters"]


def test_finished_runs_are_not_run_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan(tiny, tmp_path / "plan.json", [{"method": "head", "seed": [0, 1]}])
    lines = compared(tiny, first)
    assert [line["run"]["seed"] for line in lines] == [0, 1]
    ran: list[Run] = []

    def remembered(run: Run, data_dir: str | None) -> dict[str, Any]:
        ran.append(run)
        return {**lines[0], "run": run.to_dict()}

    monkeypatch.setattr(compare, "execute", remembered)
    plan(tiny, first, [{"method": ["head", "magnitude"], "seed": [0, 1, 2]}])
    assert len(compared(tiny, first, "--table")) == 2
    assert len(compared(tiny, first)) == 6
    assert [(run.method, run.seed) for run in ran] == [
        ("magnitude", 0), ("magnitude", 1), ("head", 2), ("magnitude", 2),
    ]  # fmt: skip


def test_a_run_repeats(tiny: Path) -> None:
    fields = {"dataset": "glue:sst2", "model": str(tiny / "bert"), "max_steps": 4,
              "max_length": 16, "learning_rate": 1e-3, "method": "gates", "bf16": True}  # fmt: skip
    lines = [execute(Run.from_dict(fields), str(tiny)) for _ in range(2)]
    assert lines[0]["loss"] == lines[1]["loss"]
    assert execute(Run.from_dict({**fields, "seed": 1}), str(tiny))["loss"] != lines[0]["loss"]


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_the_same_way_but_for_gates(tiny: Path, method: str) -> None:
    _, model = prepared(tiny, method)
    assert trainer_class(model) is (GatedTrainer if method in ("gates", "paper") else Trainer)


@pytest.mark.parametrize("method", ["magnitude", "activation"])
def test_one_shot_masks_stay(tiny: Path, method: str) -> None:
    _, model = prepared(tiny, method, sparsity=0.3)
    gates = GateMap(model)
    assert gates.removal().fraction == pytest.approx(0.3, abs=0.01)
    assert not any(gate.logits.requires_grad for gate in gates.gates())


def test_lora_starts_as_the_model(tiny: Path) -> None:
    plain, model = prepared(tiny, "lora")
    ids = torch.randint(5, 45, (4, 7))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)


def test_two_of_four_keeps_the_largest(tiny: Path) -> None:
    plain, model = prepared(tiny, "2:4")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(MODULES):
            kept = module.weight != 0
            assert (kept.view(-1, 4).sum(1) == 2).all()
            before = plain.get_submodule(name).weight
            torch.testing.assert_close(module.weight, before * kept, rtol=0, atol=0)
    assert (model.classifier.weight != 0).all()


def test_plan_expands_lists_and_sorts_by_seed(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    rows = [
        {"method": "gates", "sparsity": [0.2, 0.4], "seed": [0, 1]},
        {"method": "paper", "sparsity": 0.3},
    ]
    common = {"dataset": "glue:sst2", "learning_rate": 1e-3}
    path.write_text(json.dumps({"common": common, "rows": rows}))
    runs = read_plan(path)
    assert [(run.gates["sparsity"], run.seed) for run in runs] == [
        (0.2, 0), (0.4, 0), (0.3, 0), (0.2, 1), (0.4, 1),
    ]  # fmt: skip
    assert runs[0].gate_config().distribution == "ranking"
    assert runs[2].gate_config() == GateConfig.paper(sparsity=0.3)
    assert [Run.from_dict(run.to_dict()) for run in runs] == runs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("{}", "'rows'"),
        ("[]", "object has no attribute"),
        ('{"rows": [{"method": "head"}]}', r"lacks \['learning_rate'\]"),
        ('{"rows": [{"method": "head", "learning_rate": 1}]}', "one of dataset and train_file"),
        ('{"rows": [{"speed": 3}]}', r"unknown keys \['speed'\]"),
        (
            '{"rows": [{"dataset": "d", "learning_rate": 1, "method": "magic"}]}',
            "method must be one of dense, head, .* got 'magic'",
        ),
        (
            '{"rows": [{"dataset": "d", "learning_rate": 1, "method": "gates", "sparsity": 2}]}',
            r"sparsity must be in \(0, 1\), got 2",
        ),
    ],
)
def test_bad_plans_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"plan.json: .*{message}"):
        read_plan(path)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_kept_results_are_runs_of_their_plans(path: Path) -> None:
    """Each once, so that a plan goes on where it stopped and a table counts no seed twice."""
    planned = [run.to_dict() for run in read_plan(path.with_suffix(".json"))]
    found = [line["run"] for line in compare.read_results(path)]
    assert [run for run in found if run not in planned] == []
    assert [run for run in planned if found.count(run) > 1] == []


def test_language_models_are_scored_by_perplexity(tiny: Path, tmp_path: Path) -> None:
    """No step is a pretrained model as it is; every method takes any text."""
    tiny_text.write_model(tmp_path / "llama")
    tiny_text.write_text(tmp_path / "train.txt")
    tiny_text.write_text(tmp_path / "valid.txt", seed=1)
    common = {
        "train_file": "train.txt", "validation_file": "valid.txt", "model": "llama",
        "learning_rate": 1e-2, "max_length": 16, "batch_size": 8, "sparsity": 0.2,
        "trainable": [["*norm.weight"]],
    }  # fmt: skip
    rows = [
        {"method": "dense", "max_steps": 0},
        {"method": ["gates", "activation", "lora"], "max_steps": 20},
    ]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"common": common, "rows": rows}))
    before, *after = compared(tmp_path, path)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    tokenizer = tiny_text.tokenizer()
    blocks = pack(file_documents(tmp_path / "valid.txt"), tokenizer, 16)
    ids = torch.tensor(list(blocks))
    loss = model(ids, labels=ids).loss
    assert before["scores"]["perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-4)
    for found in after:
        assert found["scores"]["perplexity"] < before["scores"]["perplexity"]
    assert [found["removed"] for found in after] == pytest.approx([0.2, 0.2, 0.0], abs=0.02)
    lines = [
        {**found, "scores": {"perplexity": score}, "run": {**found["run"], "seed": seed}}
        for seed, (found, score) in enumerate(zip(after[:1] * 2, (12.25, 9.75), strict=True))
    ]
    assert "| gates | " in spread_table(lines)
    assert "| 11.00 ± 1.77 (2) |" in spread_table(lines)


def test_bad_results_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"run": {}}\n{"run": \n')
    with pytest.raises(ValueError, match="results.jsonl line 2: not JSON"):
        compare.read_results(path)


def line(method: str, score: float, **run: Any) -> dict[str, Any]:
    run = {"method": method, "dataset": "d", "seed": 0, "learning_rate": 1e-3, **run}
    return {"run": run, "scores": {"accuracy": score, "f1": 0.0}, "removed": 0.25}


def test_table_takes_the_best_rate_over_seeds() -> None:
    lines = [
        line("head", 0.7, seed=0), line("head", 0.8, seed=1),
        line("head", 0.79, seed=0, learning_rate=3e-3),
        line("gates", 0.9, sparsity=0.4), line("gates", 0.8, sparsity=0.4, tie="none"),
    ]  # fmt: skip
    assert spread_table(lines).splitlines()[2:] == [
        "| head | 25.0 % | 79.00 (1) | 0.003 | 0.001: 75.00 ± 7.07 (2) |",
        "| gates | 25.0 % | 90.00 (1) | 0.001 |  |",
        "| gates, tie none | 25.0 % | 80.00 (1) | 0.001 |  |",
    ]


def test_figure_of_the_scores(tiny: Path, tmp_path: Path) -> None:
    path = plan(tiny, tmp_path / "plan.json", [])
    lines = [
        line("gates", score, sparsity=sparsity, seed=seed)
        for sparsity, score in ((0.2, 0.9), (0.6, 0.8)) for seed in (0, 1)
    ]  # fmt: skip
    lines.append({**line("head", 0.7), "removed": 0.0})
    path.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compared(tiny, path, "--figure", str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="lines must not be empty"):
        plot_spread(tmp_path / "none.png", [])
