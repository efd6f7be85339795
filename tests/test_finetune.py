"""The main job on a tiny model and a tiny local task: whole, interrupted, and with bad input."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    HfArgumentParser,
)

import finegates.hf
from finegates import FusedGatedLinear, GateConfig, PrunedLinear
from finegates.cli import main
from finegates.cost_table import CostTable
from finegates.recipes import finetune_glue, training
from finegates.recipes import job as recipe
from finegates.recipes.arguments import FinetuneArguments, FinetuneTrainingArguments
from finegates.recipes.finetune_glue import Finetune
from finegates.recipes.models import DEFAULT_MODEL
from priced import costs_of
from shared_data import shared
from tiny_tasks import WORDS, write_model, write_split, write_task


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folders of a tiny BERT with its tokenizer and of a task in SST-2's layout."""
    root = tmp_path_factory.mktemp("tiny")
    model, data = root / "bert", root / "SST-2"
    write_model(model)
    write_task(data)
    return model, data


def words(tiny: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    model, data = tiny
    return [
        "--model", str(model), "--data_dir", str(data), "--output_dir", str(output),
        "--max_steps", "8", "--save_steps", "2", "--max_length", "16", "--use_cpu", "True",
        "--per_device_train_batch_size", "8", "--disable_tqdm", "True", *more,
    ]  # fmt: skip


def job(arguments: list[str]) -> Finetune:
    """Return the job of these words, its data and model loaded and its folder claimed."""
    kinds: Any = (FinetuneArguments, FinetuneTrainingArguments)
    return Finetune(*HfArgumentParser(kinds).parse_args_into_dataclasses(arguments))


@pytest.fixture(autouse=True)
def _quick_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time for a moment: these tests look at the job, not at speed."""
    latency = finetune_glue.report.latency

    def quick(*args: Any, **kwargs: Any) -> Any:
        return latency(*args, **kwargs, seconds=0.01, warmup=1, min_rounds=2)

    monkeypatch.setattr(finetune_glue.report, "latency", quick)


def test_job_ends_with_a_pruned_model_that_loads(
    tiny: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(["finetune", *words(tiny, output)]) == 0
    printed = capsys.readouterr().out
    assert "gated weights, removed" in printed
    written = json.loads((output / "report.json").read_text())
    rows = {row["model"]: row for row in written["rows"]}
    assert list(rows) == ["head + biases", "full fine-tuning", "gated", "pruned", "reloaded"]
    assert rows["pruned"]["removed"] == pytest.approx(0.4, abs=0.005)
    assert rows["gated"]["score"] == rows["pruned"]["score"] == rows["reloaded"]["score"]
    assert rows["reloaded"]["disk"] < rows["full fine-tuning"]["disk"]
    assert {(t["model"], t["inputs"]) for t in written["timings"]} >= {
        ("full fine-tuning", "batch 1"), ("reloaded", "batch 32"),
    }  # fmt: skip
    assert (output / "kept.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForSequenceClassification.from_pretrained(output / "pruned")
    assert any(isinstance(module, PrunedLinear) for module in model.modules())
    parameters = sum(p.numel() for p in model.parameters())
    dense = AutoModelForSequenceClassification.from_pretrained(output / "dense" / "model")
    total = sum(p.numel() for p in dense.parameters())
    removed = 1.0 - parameters / total
    assert rows["pruned"]["removed_of_model"] == pytest.approx(removed, abs=1e-3)


def test_interrupted_job_goes_on(
    tiny: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A job that dies while it writes a checkpoint ends as the uninterrupted one."""
    assert main(["finetune", *words(tiny, tmp_path / "whole")]) == 0
    expected = json.loads((tmp_path / "whole" / "report.json").read_text())

    class Interrupted(Exception):
        pass

    controller = finegates.hf.trainer.GateController
    after_step = controller.after_step

    def dying(self: Any, step: int) -> None:
        after_step(self, step)
        if step == 5:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(controller, "after_step", dying)
        with pytest.raises(Interrupted):
            main(["finetune", *words(tiny, tmp_path / "run")])
    gated = tmp_path / "run" / "gated"
    assert (tmp_path / "run" / "dense" / "model").is_dir()
    assert not (gated / "model").exists()
    assert {path.name for path in gated.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    newest = gated / "checkpoint-4" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    said: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("transformers.trainer"),
        "callHandlers",
        lambda record: said.append(record.getMessage()),
    )
    with caplog.at_level(logging.WARNING, "finegates"):
        assert main(["finetune", *words(tiny, tmp_path / "run")]) == 0
    assert "checkpoint-4 is skipped: optimizer.pt is cut short" in caplog.text
    assert "checkpoint-2 is skipped" not in caplog.text
    resumed = json.loads((tmp_path / "run" / "report.json").read_text())
    scores = [[row["score"] for row in r["rows"]] for r in (expected, resumed)]
    assert scores[0] == scores[1]
    assert not [line for line in said if "missing keys" in line]
    weights = [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "pruned").state_dict()
        for name in ("whole", "run")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_another_runs_folder_is_refused(
    tiny: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "run.json").write_text('{"another": "run"}')
    (output / "keep.txt").write_text("mine")
    assert main(["finetune", *words(tiny, output)]) == 2
    error = capsys.readouterr().err
    assert "holds another run" in error
    assert len(error.strip().splitlines()) == 1
    assert (output / "keep.txt").read_text() == "mine"


def test_foreign_folder_is_never_replaced(
    tiny: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["finetune", *words(tiny, tmp_path, "--overwrite_output_dir", "True")]) == 2
    assert "holds files that no run wrote" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sparsity", "1.5"], "sparsity must be in (0, 1), got 1.5"),
        (["--distribution", "bernoulli"], "distribution must be one of"),
        (["--gates", "{warmup: 0.1}"], "gates must be a JSON object, got '{warmup: 0.1}'"),
        (["--gates", "[1]"], "gates must be a JSON object, got '[1]'"),
        (["--gates", '{"tie": "none"}'], "fields of GateConfig that have no flag, got 'tie'"),
        (["--gates", '{"warmpu": 0.1}'], "fields of GateConfig that have no flag, got 'warmpu'"),
        (["--gates", '{"warmup": 2}'], "warmup must be in [0, 1), got 2"),
        (["--max_length", "64"], "max_length must be between 8 and 32, got 64"),
        (["--no_such_flag", "1"], "no_such_flag"),
        (["--sparsity", "half"], "argument --sparsity: invalid float value: 'half'"),
        (["--model", "/no/such"], "model '/no/such' can't be loaded"),
        (["--data_dir", "/no/SST-2"], "train.tsv is not a file"),
        (["--resume_from_checkpoint", "x"], "resume_from_checkpoint must be True or a checkpoint"),
    ],
)
def test_bad_arguments_end_in_one_line(
    tiny: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert main(["finetune", *words(tiny, tmp_path / "run", *more)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_reloaded_model_that_scores_differently_fails_the_job(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.5, 0.5, 0.5, 0.75])
    monkeypatch.setattr(Finetune, "score", lambda self, model: next(scores))
    with pytest.raises(RuntimeError, match="reloaded model scores 0.75"):
        main(["finetune", *words(tiny, tmp_path / "run")])
    assert not (tmp_path / "run" / "report.json").exists()


def test_paper_constants_are_one_flag(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert main(["finetune", *words(tiny, output, "--paper", "True")]) == 0
    written = json.loads((output / "report.json").read_text())
    assert written["job"]["paper"] is True
    gated = json.loads((output / "gated" / "model" / "config.json").read_text())
    stored = GateConfig.from_dict(gated["quantization_config"]["gate_config"])
    assert replace(stored, modules=None) == GateConfig.paper()


def test_further_fields_of_the_gates_are_json() -> None:
    arguments = FinetuneArguments(gates='{"warmup": 0.1, "closed_gradient": false}')
    assert arguments.gate_config() == GateConfig(warmup=0.1, closed_gradient=False)
    arguments = FinetuneArguments(gates='{"penalty_weight": 5}', paper=True, sparsity=0.3)
    assert arguments.gate_config() == GateConfig.paper(penalty_weight=5, sparsity=0.3)


def test_epochs_count_when_they_are_given() -> None:
    def steps(**given: float) -> tuple[int, float]:
        training = FinetuneTrainingArguments(use_cpu=True, **given)
        return training.max_steps, training.num_train_epochs

    assert steps()[0] == 300
    assert steps(num_train_epochs=2.0) == (-1, 2.0)
    assert steps(num_train_epochs=2.0, max_steps=7)[0] == 7


def test_epochs_set_the_length_of_the_schedule(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    controller = finegates.hf.trainer.GateController
    init = controller.__init__

    def noting(self: Any, model: Any, total_steps: int) -> None:
        lengths.append(total_steps)
        init(self, model, total_steps)

    monkeypatch.setattr(controller, "__init__", noting)
    arguments = words(tiny, tmp_path / "run", "--num_train_epochs", "0.5")
    at = arguments.index("--max_steps")
    del arguments[at : at + 2]
    assert main(["finetune", *arguments]) == 0
    assert lengths == [8]


@pytest.mark.parametrize(
    "change",
    [
        ["--weight_decay", "0.1"],
        ["--lr_scheduler_type", "constant"],
        ["--gradient_accumulation_steps", "2"],
        ["--seed", "7"],
        ["--tie", "none"],
    ],
    ids=lambda change: change[0],
)
def test_what_changes_the_result_makes_another_run(
    tiny: tuple[Path, Path], tmp_path: Path, change: list[str]
) -> None:
    output = tmp_path / "run"
    job(words(tiny, output))
    job(words(tiny, output, "--logging_steps", "3", "--save_steps", "5", "--disable_tqdm", "False"))
    with pytest.raises(ValueError, match="holds another run"):
        job(words(tiny, output, *change))


def test_saving_steps_choose_where_the_best_checkpoint_is_loaded(
    tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    best = ["--load_best_model_at_end", "True", "--eval_strategy", "steps", "--eval_steps", "1"]
    output = tmp_path / "run"
    job(words(tiny, output, *best))
    with pytest.raises(ValueError, match="holds another run"):
        job(words(tiny, output, *best, "--save_steps", "4"))


def test_job_ends_with_its_best_checkpoint(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    best = ["--load_best_model_at_end", "True", "--metric_for_best_model", "accuracy"]
    steps = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_total_limit", "9"]
    assert main(["finetune", *words(tiny, output, *best, *steps)]) == 0
    state = json.loads((output / "gated" / "history.json").read_text())
    scores = {e["step"]: e["eval_accuracy"] for e in state["log_history"] if "eval_accuracy" in e}
    # The target is reached at 0.6 of the 8 steps.
    assert state["best_metric"] == max(scores[6], scores[8])
    rows = {row["model"]: row for row in json.loads((output / "report.json").read_text())["rows"]}
    assert rows["reloaded"]["score"] == state["best_metric"]
    assert rows["reloaded"]["removed"] == pytest.approx(0.4, abs=0.01)


def test_budget_of_latency_is_measured_once(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[int] = []

    def measure(model: Any, config: GateConfig, count: int) -> CostTable:
        tokens.append(count)
        return costs_of(model)

    monkeypatch.setattr(recipe.report, "measure_costs", measure)
    output = tmp_path / "run"
    latency = ["--budget", "latency", "--budget_tokens", "16", "--sparsity", "0.3"]
    assert main(["finetune", *words(tiny, output, *latency)]) == 0
    first = job(words(tiny, output, *latency))
    assert tokens == [16]
    assert first.gate_config.costs == CostTable.from_dict(
        json.loads((output / "costs.json").read_text())
    )
    written = json.loads((output / "report.json").read_text())
    assert written["job"]["budget"] == "latency"
    for row in written["rows"][2:]:
        assert row["requested"] is None
        assert row["requested_latency"] == 0.3
        assert row["removed_latency"] == pytest.approx(0.3, abs=0.01)
    (output / "costs.json").write_text("{}")
    with pytest.raises(ValueError, match=r"costs.json: costs don't have a CostTable's form"):
        job(words(tiny, output, *latency))


def test_gate_constants_are_part_of_the_run(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release with other defaults doesn't go on with an older one's checkpoints."""
    job(words(tiny, tmp_path / "run"))
    config = FinetuneArguments().gate_config()
    monkeypatch.setattr(FinetuneArguments, "gate_config", lambda self: replace(config, warmup=0.1))
    with pytest.raises(ValueError, match="holds another run"):
        job(words(tiny, tmp_path / "run"))


def test_all_arms_train_what_they_say(
    tiny: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The baseline is the plain model without gate noise; a new pooler is trained in every arm.

    Nothing is trained here, so that nothing is removed, which the job must notice.
    """
    model = tmp_path / "bert"
    shutil.copytree(tiny[0], model)
    BertForMaskedLM(BertConfig.from_pretrained(model)).save_pretrained(model)
    arms: list[Any] = []

    def train(self: Any, **kwargs: Any) -> None:
        arms.append(self.model)

    monkeypatch.setattr(training.Trainer, "train", train)
    with pytest.raises(RuntimeError, match="^0.00% of the gated weights are removed, 40.00% were"):
        main(["finetune", *words((model, tiny[1]), tmp_path / "run", "--distribution", "gaussian")])
    adapted, dense, gated = (
        {name for name, p in arm.named_parameters() if p.requires_grad} for arm in arms
    )
    is_gated = [any(isinstance(m, FusedGatedLinear) for m in arm.modules()) for arm in arms]
    assert is_gated == [False, False, True]
    assert adapted == {name for name in gated if not name.endswith(".logits")}
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight"} <= adapted
    assert dense == {name for name, _ in arms[1].named_parameters()}
    assert caplog.text.count("has no pooler; a random one is trained as head") == 1
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_trained_pooler_stays_frozen(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    assert not any("pooler" in p for p in job(words(tiny, tmp_path)).gate_config.trainable)


def test_one_large_unit_may_miss_by_more_than_half_a_point() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    config = finegates.GateConfig(modules=("*",), sparsity=0.45)
    gated = finegates.gate_(model, config)
    assert recipe._largest_unit(gated) == 4 / 12
    with torch.no_grad():
        gated[0].row_gate.logits[0] = -1.0
    recipe.check_removed(gated, config)
    with pytest.raises(RuntimeError, match="33.33% of the gated weights are removed, 80.00% were"):
        recipe.check_removed(gated, replace(config, sparsity=0.8))


def test_output_folder_is_claimed_late_and_a_lone_part_is_no_run(
    tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with pytest.raises(ValueError, match="max_length"):
        job(words(tiny, output, "--max_length", "64"))
    assert not output.exists()
    output.mkdir()
    (output / "run.part").write_text("half")
    job(words(tiny, output))
    assert [path.name for path in output.iterdir()] == ["run.json"]
    (output / "run.json").write_text('{"mod')
    with pytest.raises(ValueError, match=r"run/run\.json: not valid JSON"):
        job(words(tiny, output))
    job(words(tiny, output, "--overwrite_output_dir", "True"))


def test_small_validation_split_and_no_correlation(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is as large as the split, and a score that is NaN is null in the report."""
    data = tmp_path / "SST-2"
    shutil.copytree(tiny[1], data)
    write_split(data / "dev.tsv", 20)
    monkeypatch.setattr(Finetune, "score", lambda self, model: math.nan)
    output = tmp_path / "run"
    assert main(["finetune", *words((tiny[0], data), output)]) == 0
    written = json.loads((output / "report.json").read_text(), parse_constant=pytest.fail)
    assert [row["score"] for row in written["rows"]] == [None] * 5
    assert {timing["inputs"] for timing in written["timings"]} == {"batch 1", "batch 20"}


def test_empty_split_is_refused(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    data = tmp_path / "SST-2"
    shutil.copytree(tiny[1], data)
    write_split(data / "dev.tsv", 0)
    with pytest.raises(ValueError, match="split 'validation' of sst2 must not be empty"):
        job(words((tiny[0], data), tmp_path / "run"))


def test_further_labelled_splits_are_scored(
    tiny: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "SST-2"
    shutil.copytree(tiny[1], data)
    write_split(data / "test_labelled.tsv", 30)
    output = tmp_path / "run"
    assert main(["finetune", *words((tiny[0], data), output)]) == 0
    score = json.loads((output / "report.json").read_text())["splits"]["test"]
    assert 0.0 < score <= 1.0
    assert f"test: accuracy {100 * score:.1f} % (reloaded)" in capsys.readouterr().out


def test_regression_is_scored_by_correlation(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """STS-B: one output, a float label, Pearson's correlation."""
    data, rng = tmp_path / "STS-B", random.Random(0)
    data.mkdir()
    for name, rows in (("train", 128), ("dev", 64)):
        lines = ["sentence1\tsentence2\tscore"]
        for _ in range(rows):
            first, second = (" ".join(rng.choices(WORDS, k=5)) for _ in range(2))
            lines.append(f"{first}\t{second}\t{5.0 * rng.random():.3f}")
        (data / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    output = tmp_path / "run"
    assert main(["finetune", *words((tiny[0], data), output)]) == 0
    written = json.loads((output / "report.json").read_text())
    assert written["metric"] == "pearson"
    assert all(-1.0 <= row["score"] <= 1.0 for row in written["rows"])
    model = AutoModelForSequenceClassification.from_pretrained(output / "pruned")
    assert model.config.num_labels == 1


def test_both_development_sets_of_mnli_are_scored(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    data, rng = tmp_path / "MNLI", random.Random(0)
    data.mkdir()
    for name, rows in (("train", 96), ("dev_matched", 30), ("dev_mismatched", 30)):
        lines = ["sentence1\tsentence2\tgold_label"]
        for _ in range(rows):
            texts = [" ".join(rng.choices(WORDS, k=4)) for _ in range(2)]
            label = rng.choice(["entailment", "neutral", "contradiction"])
            lines.append("\t".join([*texts, label]))
        (data / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    output = tmp_path / "run"
    assert main(["finetune", *words((tiny[0], data), output)]) == 0
    written = json.loads((output / "report.json").read_text())
    assert set(written["splits"]) == {"validation_mismatched"}
    assert 0.0 <= written["splits"]["validation_mismatched"] <= 1.0


def test_quick_run_on_the_real_model_and_real_sentences(tmp_path: Path) -> None:
    """MiniLM on the start of SST-2: a few steps, the whole job."""
    source, data = shared("glue/SST-2"), tmp_path / "SST-2"
    data.mkdir()
    for name, rows in (("train", 200), ("dev", 64)):
        lines = (source / f"{name}.tsv").read_text().splitlines()[: rows + 1]
        (data / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    more = ("--model", DEFAULT_MODEL, "--max_length", "32", "--save_strategy", "no")
    output = tmp_path / "run"
    assert main(["finetune", *words((tmp_path, data), output, *more)]) == 0
    rows = {row["model"]: row for row in json.loads((output / "report.json").read_text())["rows"]}
    assert rows["pruned"]["removed"] == pytest.approx(0.4, abs=0.002)
    assert rows["gated"]["score"] == rows["reloaded"]["score"]
    assert rows["reloaded"]["disk"] < 0.85 * rows["full fine-tuning"]["disk"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_trained_on_a_gpu_and_timed_on_the_cpu(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = words(tiny, tmp_path / "run")
    at = arguments.index("--use_cpu")
    del arguments[at : at + 2]
    assert main(["finetune", *arguments]) == 0
