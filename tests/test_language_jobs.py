"""Sparsifying and pretraining a Llama: whole, killed, with bad input; quick runs on real data."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

import finegates.hf
from finegates import GateConfig, PrunedLinear, gate_
from finegates.cli import main
from finegates.recipes import job as recipe
from finegates.recipes import training
from finegates.recipes.arguments import PosttrainArguments, PretrainArguments
from finegates.recipes.sparse_pretrain_llama import CONFIGS, load_config
from finegates.surgery import GateMap
from shared_data import shared
from tiny_text import config, tokenizer, words, write_model, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "train.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    config(tie_word_embeddings=False).to_json_file(path)
    return path


@pytest.fixture(autouse=True)
def _quick_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time for a moment: these tests look at the job, not at speed."""
    latency = finegates.report.latency

    def quick(*args: Any, **kwargs: Any) -> Any:
        return latency(*args, **kwargs, seconds=0.01, warmup=1, min_rounds=2)

    monkeypatch.setattr(finegates.report, "latency", quick)


def report_of(output: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads((output / "report.json").read_text())
    return written


def history_of(output: Path, stage: str = "gated") -> list[dict[str, Any]]:
    state: dict[str, Any] = json.loads((output / stage / "history.json").read_text())
    log: list[dict[str, Any]] = state["log_history"]
    return log


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in report_of(output)["rows"]}


def pruned(output: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(output / "pruned")


def same_weights(first: Path, second: Path) -> bool:
    one, other = (pruned(folder).state_dict() for folder in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_posttrain_ends_with_a_pruned_model_that_loads(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    more = ("--model", str(llama), "--sparsity", "0.3", "--report_to", "tensorboard")
    assert main(["posttrain", *words(text, output, *more)]) == 0
    printed = capsys.readouterr().out
    written, rows = report_of(output), rows_of(output)
    assert list(rows) == ["dense", "gated", "pruned", "reloaded"]
    assert rows["gated"]["score"] == rows["pruned"]["score"] == rows["reloaded"]["score"]
    assert rows["pruned"]["removed"] == pytest.approx(0.3, abs=0.02)
    assert rows["gated"]["step"] > 0.0
    assert written["job"]["architecture"] == "llama"
    assert written["job"]["couplings"] == 6
    assert set(written["samples"]) == {"dense", "reloaded"}
    assert f"reloaded: {written['samples']['reloaded']}" in " ".join(printed.split())
    log = history_of(output)
    removed = [entry["removed"] for entry in log if "loss" in entry]
    assert removed[0] == 0.0
    assert removed[-1] == pytest.approx(0.3, abs=0.02)
    units = len(torch.cat([g.logits for g in GateMap(gated_of(output)).gates()]))
    assert {sum(entry["gates"]) for entry in log if "gates" in entry} == {units}
    for name in ("kept.png", "training.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert list((output / "gated").rglob("events.out.tfevents*"))
    model = pruned(output)
    assert any(isinstance(module, PrunedLinear) for module in model.modules())
    assert all(getattr(module, "bias", None) is None for module in model.modules())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head) is torch.nn.Linear


def gated_of(output: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(output / "gated" / "model")


def test_the_head_is_gated_on_request(llama: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    more = ("--model", str(llama), "--gate_head", "True", "--sparsity", "0.5", "--new_tokens", "0")
    assert main(["posttrain", *words(text, output, *more)]) == 0
    assert "lm_head" in {layer["name"] for layer in report_of(output)["layers"]}
    assert report_of(output)["samples"] == {}


def test_only_gates_and_norms_are_trained(llama: Path, text: Path, tmp_path: Path) -> None:
    for flag, more in (("True", 5 * 16), ("False", 0)):
        output = tmp_path / flag
        arguments = ("--model", str(llama), "--train_norms", flag, "--new_tokens", "0")
        assert main(["posttrain", *words(text, output, *arguments)]) == 0
        units = sum(gate.logits.numel() for gate in GateMap(gated_of(output)).gates())
        assert rows_of(output)["gated"]["trainable"] == units + more


def test_what_is_trained_can_be_named() -> None:
    assert PosttrainArguments().gate_config().trainable == ("*norm.weight",)
    assert PosttrainArguments(train_norms=False).gate_config().trainable == ()
    named = PosttrainArguments(gates='{"trainable": ["*"], "train_weight": true}')
    assert named.gate_config().trainable == ("*",)


def test_pretraining_computes_with_what_is_left() -> None:
    assert PretrainArguments().gate_config().shrink_every == 10
    assert PretrainArguments(gates='{"shrink_every": 0}').gate_config().shrink_every == 0
    assert PretrainArguments(distribution="gaussian").gate_config().shrink_every == 0
    assert PretrainArguments(paper=True).gate_config().shrink_every == 0


def test_pretrain_against_the_same_run_without_gates(
    tiny_config: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    more = ("--config", str(tiny_config), "--tokenizer", str(llama), "--compare", "True")
    more += ("--gate_start", "5", "--gate_down_proj", "False")
    assert main(["pretrain", *words(text, output, *more)]) == 0
    written, rows = report_of(output), rows_of(output)
    assert list(rows) == ["dense", "gated", "pruned", "reloaded"]
    assert rows["pruned"]["removed"] == pytest.approx(0.4, abs=0.03)
    assert written["ratios"]["loss"] == rows["gated"]["score"] / rows["dense"]["score"]
    dense, gated = (
        [entry for entry in history_of(output, stage) if "loss" in entry]
        for stage in ("dense", "gated")
    )
    # The gates are open until the fifth step: until then the runs are one.
    for step in range(5):
        assert gated[step]["loss"] == pytest.approx(dense[step]["loss"], rel=1e-4)
        assert gated[step]["removed"] == 0.0
    assert gated[5]["removed"] > 0.0
    assert not any("down_proj" in layer["name"] for layer in written["layers"] if is_gated(layer))
    model = gated_of(output)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert rows["gated"]["trainable"] == total


def is_gated(layer: dict[str, Any]) -> bool:
    return bool(layer["kept_rows"] < layer["rows"])


def test_killed_run_goes_on_bit_for_bit(
    tiny_config: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    """SIGKILL in the ramp, in another process: gates, controller, order and RNG come back."""
    more = ("--config", str(tiny_config), "--tokenizer", str(llama), "--gate_start", "0.2")
    whole, killed = (
        ["pretrain", *words(text, tmp_path / name, *more)] for name in ("whole", "killed")
    )
    code = (
        "import os, sys; from finegates.cli import main;"
        "from finegates.surgery import GateController as C; after = C.after_step\n"
        "def dying(self, step):\n"
        "    after(self, step)\n"
        "    if step == 6: os.kill(os.getpid(), 9)\n"
        "C.after_step = dying; main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *killed], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    stage = tmp_path / "killed" / "gated"
    assert {path.name for path in stage.iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert main(killed) == 0
    assert main(whole) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    for key in ("loss", "eval_loss", "gates"):
        whole, killed = (
            [entry.get(key) for entry in history_of(tmp_path / name)]
            for name in ("whole", "killed")
        )
        assert whole == killed


def test_a_named_checkpoint_is_taken(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "run"
    arguments = [
        "posttrain",
        *words(text, output, "--model", str(llama), "--save_total_limit", "9"),
    ]
    interrupt(monkeypatch, at=7, arguments=arguments)
    named = output / "gated" / "checkpoint-2"
    assert main([*arguments, "--resume_from_checkpoint", str(named.with_name("checkpoint-3"))]) == 2
    assert "resume_from_checkpoint must be True or a checkpoint of" in capsys.readouterr().err
    seen: list[Any] = []
    train = training.Trainer.train

    def noting(self: Any, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        seen.append(resume_from_checkpoint)
        return train(self, resume_from_checkpoint, **kwargs)

    monkeypatch.setattr(training.Trainer, "train", noting)
    assert main([*arguments, "--resume_from_checkpoint", str(named)]) == 0
    assert seen == [str(named)]
    capsys.readouterr()
    assert main([*arguments, "--resume_from_checkpoint", str(named)]) == 2
    assert "stage 'gated' has ended; remove" in capsys.readouterr().err
    assert main([*arguments, "--resume_from_checkpoint", "True"]) == 0
    (named / "optimizer.pt").write_bytes(b"PK")
    for path in (output / "gated" / "model").iterdir():
        path.unlink()
    (output / "gated" / "model").rmdir()
    capsys.readouterr()
    assert main([*arguments, "--resume_from_checkpoint", str(named)]) == 2
    assert "checkpoint-2: optimizer.pt is cut short" in capsys.readouterr().err


class Interrupted(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, arguments: list[str]) -> None:
    """Run a job that dies in the middle of a step."""
    controller = finegates.hf.trainer.GateController
    after_step = controller.after_step

    def dying(self: Any, step: int) -> None:
        after_step(self, step)
        if step == at:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(controller, "after_step", dying)
        with pytest.raises(Interrupted):
            main(arguments)


def poison(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let a step end with a norm that is NaN."""
    controller = finegates.hf.trainer.GateController
    after_step = controller.after_step

    def poisoning(self: Any, step: int) -> None:
        after_step(self, step)
        if step == at:
            self.model.model.norm.weight.data.fill_(float("nan"))

    def init(self: Any, model: Any, total_steps: int, **kwargs: Any) -> None:
        self.model = model
        original(self, model, total_steps, **kwargs)

    original = controller.__init__
    monkeypatch.setattr(controller, "__init__", init)
    monkeypatch.setattr(controller, "after_step", poisoning)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (0, "the loss is nan at step 2; there is no checkpoint"),
        (4, "the loss is nan at step 6; the last good checkpoint is {}/gated/checkpoint-4"),
        (5, "weight isn't finite after step 6; the last good checkpoint is {}/gated/checkpoint-4"),
    ],
)
def test_nan_stops_with_the_step_and_the_last_good_checkpoint(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], at: int, message: str,
) -> None:  # fmt: skip
    poison(monkeypatch, at)
    output = tmp_path / "run"
    evaluate = ("--eval_strategy", "no")
    assert main(["posttrain", *words(text, output, "--model", str(llama), *evaluate)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("finegates posttrain: ")
    assert error.endswith(message.format(output))


def test_full_disk_leaves_the_checkpoint_before(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A limit on file sizes stands for the full disk; with room again the job goes on."""
    controller = finegates.hf.trainer.GateController
    after_step = controller.after_step
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(self: Any, step: int) -> None:
        after_step(self, step)
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))

    arguments = ["posttrain", *words(text, tmp_path / "run", "--model", str(llama))]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(controller, "after_step", filling)
            assert main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint-4 can't be written: " in error
    assert error.endswith("the last good checkpoint is " + str(tmp_path / "run/gated/checkpoint-2"))
    assert [path.name for path in (tmp_path / "run" / "gated").iterdir()] == ["checkpoint-2"]
    assert main(arguments) == 0
    assert main(["posttrain", *words(text, tmp_path / "whole", "--model", str(llama))]) == 0
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_unknown_architecture_is_gated_without_couplings(
    text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, output = tmp_path / "neox", tmp_path / "run"
    torch.manual_seed(0)
    GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=33, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=64, initializer_range=0.2,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer().save_pretrained(folder)
    more = ("--model", str(folder), "--train_norms", "False", "--new_tokens", "0")
    assert main(["posttrain", *words(text, output, *more)]) == 0
    assert "GPTNeoXForCausalLM is an unknown architecture: all 8 Linears" in caplog.text
    assert "couplings: none" in caplog.text
    written = report_of(output)
    assert (written["job"]["architecture"], written["job"]["couplings"]) == (None, 0)
    assert len(written["layers"]) == 8
    assert rows_of(output)["pruned"]["removed"] == pytest.approx(0.2, abs=0.02)


def test_unknown_encoder_keeps_its_head() -> None:
    model = DistilBertForSequenceClassification(
        DistilBertConfig(n_layers=1, dim=8, n_heads=2, hidden_dim=12)
    )
    config = recipe.gate_all(GateConfig(), model)
    assert config.modules is not None
    assert all(name.startswith("distilbert.transformer.") for name in config.modules)
    assert len(config.modules) == 6
    assert recipe.gate_all(config, model) is config
    assert len(GateMap(gate_(model, config)).layers) == 6


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("posttrain", ["--block_size", "65"], "block_size must be between 2 and 64, got 65"),
        (
            "posttrain",
            ["--dtype", "int8"],
            "dtype must be 'auto' or a torch float type, got",
        ),
        ("posttrain", ["--model", "/no/such"], "model '/no/such' can't be loaded"),
        ("posttrain", ["--max_steps", "-1", "--num_train_epochs", "2"], "max_steps must be given"),
        ("pretrain", ["--config", "llama_1t"], "config must be one of llama_130m, "),
        ("pretrain", ["--gate_start", "10"], "gate_start must be below max_steps=10 and not"),
        ("pretrain", ["--tokenizer", "/no/such"], "model '/no/such' can't be loaded"),
    ],
)
def test_bad_arguments_end_in_one_line(
    llama: Path, tiny_config: Path, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], command: str, more: list[str], message: str,
) -> None:  # fmt: skip
    model = ["--model", str(llama)]
    if command == "pretrain":
        model = ["--config", str(tiny_config), "--tokenizer", str(llama)]
    assert main([command, *words(text, tmp_path / "run", *model, *more)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert not (tmp_path / "run").exists()


def test_another_jobs_folder_is_refused(
    llama: Path, tiny_config: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    run = ("--model", str(llama), "--new_tokens", "0")
    assert main(["posttrain", *words(text, output, *run)]) == 0
    other = ("--config", str(tiny_config), "--tokenizer", str(llama))
    assert main(["pretrain", *words(text, output, *other)]) == 2
    assert "holds another run; name another folder or pass --over" in capsys.readouterr().err
    assert main(["pretrain", *words(text, output, *other, "--overwrite_output_dir", "True")]) == 0
    assert list(rows_of(output)) == ["gated", "pruned", "reloaded"]


def test_shipped_configs_have_their_sizes() -> None:
    """Parameters in millions with their own vocabulary of 32,000."""
    sizes = {}
    for path in CONFIGS.glob("*.json"):
        shipped = load_config(path.stem, tokenizer())
        shipped.vocab_size = 32_000
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shipped)
        sizes[path.stem] = round(sum(p.numel() for p in model.parameters()) / 1e6)
    assert sizes == {
        "llama_9m": 9, "llama_20m": 20, "llama_60m": 58, "llama_130m": 134, "llama_350m": 368,
        "llama_1b": 1339, "llama_3b": 2686, "llama_7b": 6738,
    }  # fmt: skip


def test_configs_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        load_config(str(path), tokenizer())
    path.write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"config\.json: model_type must be 'llama'"):
        load_config(str(path), tokenizer())


def test_quick_posttrain_of_a_trained_model(tmp_path: Path) -> None:
    """stories260K on TinyStories: the dense perplexity is the model's own, 4.4."""
    model, stories = shared("stories260k/hf"), shared("tinystories/tinystories_10k.txt")
    more = ("--model", str(model), "--block_size", "128", "--validation_blocks", "32")
    more += ("--sparsity", "0.05", "--per_device_train_batch_size", "8", "--max_steps", "12")
    assert main(["posttrain", *words(stories, tmp_path / "run", *more)]) == 0
    rows = rows_of(tmp_path / "run")
    assert 4.0 < rows["dense"]["score"] < 4.8
    assert rows["dense"]["score"] < rows["reloaded"]["score"] < 2.0 * rows["dense"]["score"]
    assert rows["pruned"]["removed"] == pytest.approx(0.05, abs=0.002)
    assert "Once upon a time" in report_of(tmp_path / "run")["samples"]["reloaded"]


def test_quick_pretrain_on_real_text(tiny_config: Path, tmp_path: Path) -> None:
    """A tiny Llama learns TinyStories' letters while 40 % of it closes."""
    tokens, stories = shared("stories260k/hf"), shared("tinystories/tinystories_10k.txt")
    more = ("--config", str(tiny_config), "--tokenizer", str(tokens), "--block_size", "64")
    more += ("--max_steps", "60", "--save_steps", "30", "--learning_rate", "1e-2")
    assert main(["pretrain", *words(stories, tmp_path / "run", *more)]) == 0
    log = [e["loss"] for e in history_of(tmp_path / "run") if "loss" in e]
    assert log[0] > 6.0
    rows = rows_of(tmp_path / "run")
    assert rows["reloaded"]["score"] < 5.0
    assert rows["pruned"]["removed"] == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("distribution", ["ranking", "gaussian"])
def test_gradient_checkpointing_changes_nothing(
    llama: Path, text: Path, tmp_path: Path, distribution: str
) -> None:
    """The recomputed forward draws the same gates."""
    for name, more in (("plain", ()), ("checkpointed", ("--activation_checkpointing", "True"))):
        run = ("--model", str(llama), "--new_tokens", "0", "--distribution", distribution, *more)
        assert main(["posttrain", *words(text, tmp_path / name, *run)]) == 0
    assert same_weights(tmp_path / "plain", tmp_path / "checkpointed")


def test_accumulation_changes_nothing_but_rounding(llama: Path, text: Path, tmp_path: Path) -> None:
    for name, size, parts in (("whole", "4", "1"), ("parts", "2", "2")):
        run = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", parts)
        run += ("--model", str(llama), "--new_tokens", "0")
        assert main(["posttrain", *words(text, tmp_path / name, *run)]) == 0
    for key in ("loss", "eval_loss"):
        whole, parts = (
            [entry[key] for entry in history_of(tmp_path / name) if key in entry]
            for name in ("whole", "parts")
        )
        assert len(whole) == 10
        assert parts == pytest.approx(whole, rel=1e-4)
    first, second = (report_of(tmp_path / name)["layers"] for name in ("whole", "parts"))
    assert first == second


def test_a_lora_inside_the_gates_is_folded(llama: Path, text: Path, tmp_path: Path) -> None:
    for rank in ("0", "2"):
        run = ("--model", str(llama), "--new_tokens", "0", "--lora_rank", rank)
        assert main(["posttrain", *words(text, tmp_path / rank, *run)]) == 0
    plain, with_lora = (rows_of(tmp_path / rank) for rank in ("0", "2"))
    assert with_lora["gated"]["trainable"] > plain["gated"]["trainable"]
    assert with_lora["gated"]["score"] == pytest.approx(with_lora["reloaded"]["score"], rel=1e-5)
    assert not any("lora" in name for name in pruned(tmp_path / "2").state_dict())
