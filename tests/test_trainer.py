"""Gates inside transformers' Trainer: schedule, optimizer groups, logs, exact resume."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import finegates.hf
from finegates import Gate, GateConfig, GateMap, gate_
from finegates.hf.trainer import GateCallback, GatedTrainer
from priced import costs_of
from tiny_models import VOCABULARY, build

STEPS = 12


class Tokens(torch.utils.data.Dataset[dict[str, Any]]):
    """Masked language modelling examples that depend only on their index."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(2, VOCABULARY, (7,), generator=generator)
        return {"input_ids": ids, "labels": ids.roll(1)}


class StopAt(TrainerCallback):
    """Ends the run early, as an interruption after a checkpoint does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    fields: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "save_steps": 5, "logging_steps": 1, "report_to": "none",
        "disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True,
    }  # fmt: skip
    return TrainingArguments(**{**fields, **changes})


def gated(**changes: Any) -> Any:
    torch.manual_seed(0)
    return gate_(build("bert"), GateConfig(**changes))


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_trainer_meets_the_budget_and_logs_it(tmp_path: Path) -> None:
    model = gated(sparsity=0.4)
    trainer = GatedTrainer(model=model, args=arguments(tmp_path), train_dataset=Tokens())
    trainer.train()
    assert GateMap(model).removal().fraction == pytest.approx(0.4, abs=0.01)
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    removed = [entry["removed"] for entry in losses]
    assert removed[0] == 0.0
    assert all(entry["gates_with_gradient"] > 0.5 for entry in losses)
    assert sum(entry["gates_changed_side"] for entry in losses[1:]) > 0.1
    assert trainer.state.log_history[-1]["hardened"] == 0.0
    targets = [GateConfig(sparsity=0.4).target(entry["step"] / STEPS) for entry in losses]
    assert removed == pytest.approx(targets, abs=0.01)
    assert targets[-1] == 0.4


def test_logits_have_their_own_group(tmp_path: Path) -> None:
    model = gated(gate_learning_rate=0.03)
    trainer = GatedTrainer(
        model=model, args=arguments(tmp_path, weight_decay=0.1), train_dataset=Tokens()
    )
    *others, gates = trainer.create_optimizer().param_groups
    assert gates["lr"] == 0.03
    assert gates["weight_decay"] == 0.0
    expected = {id(gate.logits) for gate in GateMap(model).gates()}
    assert {id(p) for p in gates["params"]} == expected
    rest = {id(p) for p in model.parameters() if p.requires_grad} - expected
    assert {id(p) for group in others for p in group["params"]} == rest


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"distribution": "gaussian"},
        {"shrink_every": 3, "lora_rank": 2},
        {"distribution": "gaussian", "warmup": 0.2, "ramp": 0.1, "recovery": 0.65},
        {"budget": "latency", "costs": costs_of(build("bert"))},
    ],
    ids=["ranking", "gaussian", "shrunk", "recovery", "latency"],
)
@pytest.mark.parametrize("stop", [2, 5], ids=["in-warmup", "in-ramp"])
def test_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, changes: dict[str, Any], stop: int
) -> None:
    """Bit for bit: the controller's state is in the logits, the rest is the Trainer's."""
    fields = {"warmup": 0.3, "ramp": 0.5, **changes}
    whole = gated(**fields)
    GatedTrainer(model=whole, args=arguments(tmp_path / "a"), train_dataset=Tokens()).train()

    first = gated(**fields)
    interrupted = arguments(tmp_path / "b", save_steps=stop)
    GatedTrainer(
        model=first, args=interrupted, train_dataset=Tokens(), callbacks=[StopAt(stop)]
    ).train()
    second = gated(**fields)
    GatedTrainer(model=second, args=interrupted, train_dataset=Tokens()).train(
        resume_from_checkpoint=True
    )
    resumed = state(second)
    for name, tensor in state(whole).items():
        assert torch.equal(tensor, resumed[name]), name


def test_interrupted_run_is_not_hardened(tmp_path: Path) -> None:
    """Ending early leaves the logits where the schedule was."""
    model = gated(warmup=0.5, ramp=0.5)
    GatedTrainer(
        model=model, args=arguments(tmp_path), train_dataset=Tokens(), callbacks=[StopAt(3)]
    ).train()
    assert GateMap(model).removal().removed == 0


@pytest.mark.parametrize(
    "changes",
    [{"shrink_every": 3, "lora_rank": 2}, {"distribution": "gaussian"}, {"recovery": 0.4}],
    ids=["ranking", "gaussian", "recovery"],
)
@pytest.mark.parametrize("patience", [1, 99], ids=["stopped-early", "to-the-end"])
def test_best_checkpoint_comes_back_with_its_gates(
    tmp_path: Path, changes: dict[str, Any], patience: int
) -> None:
    """Scores of steps 2 and 4, before the target is reached at 6, don't count."""
    scores = dict(zip(range(2, STEPS + 1, 2), (0.9, 0.8, 0.1, 0.3, 0.2, 0.1), strict=True))
    model = gated(warmup=0.25, ramp=0.25, **changes)
    trainer = GatedTrainer(
        model=model,
        args=arguments(
            tmp_path, save_steps=2, eval_steps=2, eval_strategy="steps", seed=3,
            load_best_model_at_end=True, metric_for_best_model="score",
        ),
        train_dataset=Tokens(),
        eval_dataset=torch.utils.data.Subset(Tokens(), range(4)),
        compute_metrics=lambda _: {"score": scores[trainer.state.global_step]},
        callbacks=[EarlyStoppingCallback(patience)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == (10 if patience == 1 else STEPS)
    assert trainer.state.best_global_step == 8
    best = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    found = {name: tensor for name, tensor in state(model).items() if name in best}
    for name, tensor in found.items():
        if name.endswith("logits"):
            torch.testing.assert_close(tensor, best[name])
        else:
            assert torch.equal(tensor, best[name]), name
    assert any(name.endswith("logits") for name in found)
    assert GateMap(model).removal().fraction == pytest.approx(0.4, abs=0.01)
    assert trainer.state.log_history[-1]["hardened"] == pytest.approx(0.0, abs=1e-6)
    assert not any(layer.fixed for layer in GateMap(model).layers.values())


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    runs = []
    for name, size, accumulate in (("a", 4, 1), ("b", 2, 2)):
        model = gated().double().eval()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = GatedTrainer(
            model=model,
            args=arguments(
                tmp_path / name,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulate,
                train_sampling_strategy="sequential",
            ),
            train_dataset=Tokens(),
        )
        trainer.train()
        runs.append(torch.cat([gate.logits.detach() for gate in GateMap(model).gates()]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-3)


def test_callback_serves_a_plain_trainer(tmp_path: Path) -> None:
    model = gated(sparsity=0.3)
    Trainer(
        model=model, args=arguments(tmp_path), train_dataset=Tokens(), callbacks=[GateCallback()]
    ).train()
    assert GateMap(model).removal().fraction == pytest.approx(0.3, abs=0.01)


def test_ungated_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gate_"):
        GatedTrainer(model=build("bert"), args=arguments(tmp_path), train_dataset=Tokens()).train()


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("roberta", {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12,
                     "intermediate_size": 3072}, 165_888),
        ("roberta", {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16,
                     "intermediate_size": 4096}, 442_368),
        ("llama", {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "intermediate_size": 8192}, 704_512),
    ],
    ids=["roberta-base", "roberta-large", "llama-3.2-1b"],
)  # fmt: skip
def test_gate_counts_of_the_paper(model_type: str, fields: dict[str, int], expected: int) -> None:
    """One gate per row and per column of every Linear of every block, the head left out."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(model_type, **fields))
    gate_(model, GateConfig(tie="none"))
    assert sum(m.logits.numel() for m in model.modules() if isinstance(m, Gate)) == expected


def test_trainer_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, finegates.hf; light = 'finegates.hf.trainer' not in sys.modules;"
        "from finegates.hf import GateCallback, GatedTrainer; print(light, GatedTrainer.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "finegates.hf.trainer"], done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = finegates.hf.Trainer
