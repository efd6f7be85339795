"""The main job on a tiny model and a tiny local task: whole, interrupted, and with bad input."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

import finegates.hf  # noqa: F401  (registers the loader)
from finegates import PrunedLinear
from finegates.cli import main
from finegates.recipes import finetune_glue
from finegates.recipes.finetune_glue import Finetune

WORDS = [f"word{i}" for i in range(40)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folders of a tiny BERT with its tokenizer and of a task in SST-2's layout."""
    root = tmp_path_factory.mktemp("tiny")
    model, data = root / "bert", root / "SST-2"
    model.mkdir()
    data.mkdir()
    vocabulary = {
        word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    }
    BertTokenizerFast(vocab=vocabulary).save_pretrained(model)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(model)
    rng = random.Random(0)
    for split, rows in (("train", 128), ("dev", 64)):
        lines = ["sentence\tlabel"]
        for _ in range(rows):
            words = rng.choices(WORDS, k=rng.randint(3, 9))
            lines.append(f"{' '.join(words)}\t{int(words[0] < words[-1])}")
        (data / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return model, data


def words(tiny: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    model, data = tiny
    return [
        "--model", str(model), "--data_dir", str(data), "--output_dir", str(output),
        "--max_steps", "8", "--save_steps", "3", "--max_length", "16", "--use_cpu", "True",
        "--per_device_train_batch_size", "8", "--disable_tqdm", "True", *more,
    ]  # fmt: skip


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
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that dies in the gated stage ends, when called again, as the uninterrupted one."""
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
    assert (tmp_path / "run" / "dense" / "model").is_dir()
    assert (tmp_path / "run" / "gated" / "checkpoint-3").is_dir()
    assert not (tmp_path / "run" / "gated" / "model").exists()
    assert main(["finetune", *words(tiny, tmp_path / "run")]) == 0
    resumed = json.loads((tmp_path / "run" / "report.json").read_text())
    scores = [[row["score"] for row in r["rows"]] for r in (expected, resumed)]
    assert scores[0] == scores[1]
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
        (["--max_length", "64"], "max_length must be between 8 and 32, got 64"),
        (["--no_such_flag", "1"], "no_such_flag"),
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


def test_reloaded_model_that_scores_differently_fails_the_job(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.5, 0.5, 0.5, 0.75])
    monkeypatch.setattr(Finetune, "_score", lambda self, model: next(scores))
    with pytest.raises(RuntimeError, match="reloaded model scores 0.75"):
        main(["finetune", *words(tiny, tmp_path / "run")])
    assert not (tmp_path / "run" / "report.json").exists()


def test_paper_constants_are_one_flag(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert main(["finetune", *words(tiny, output, "--paper", "True")]) == 0
    written = json.loads((output / "report.json").read_text())
    assert written["job"]["paper"] is True


def test_help_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "finetune" in capsys.readouterr().out
    assert main(["frobnicate"]) == 2
    assert "unknown command 'frobnicate'" in capsys.readouterr().err
