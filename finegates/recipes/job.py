"""What the recipes share: one run's output folder, stages that go on, a removal that is proved."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from rich.console import Console
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainerState, set_seed

from .. import report
from ..config import GateConfig
from ..cost_table import CostTable
from ..surgery import GateMap, architecture_of, prune_
from . import run_folder
from .arguments import GateArguments, RecipeTrainingArguments
from .checkpoints import damage, last_complete
from .training import GatedStageTrainer, StageTrainer, quiet_about_ties, step_seconds

_log = logging.getLogger("finegates")
# What is removed may differ from what was requested by 0.2 points, or one unit.
_TOLERANCE = 0.002
_NOUNS = {"parameters": "weights are", "latency": "layers' latency is"}
# Training arguments that leave the result alone: paths, logs, progress, saving, the hub, ranks.
_NO_MATTER = (
    "dataloader_num_workers", "dataloader_persistent", "dataloader_pin", "dataloader_prefetch",
    "ddp_timeout", "debug", "disable_tqdm", "do_", "enable_jit_checkpoint", "hub_", "local_rank",
    "log_", "logging_", "output_dir", "project", "push_to_hub", "report_to",
    "resume_from_checkpoint", "run_name", "save_", "skip_memory_metrics", "torch_empty_cache",
    "trackio_",
)  # fmt: skip
# Except when the best checkpoint is loaded: then they say which there are.
_CHOICE = ("save_steps", "save_strategy")
_HISTORY = "history.json"
_COSTS = "costs.json"


class Job(ABC):
    """One run of a recipe.

    Every stage trains, checkpoints and ends in a folder of its own; the same command goes on where
    an interrupted one stopped. Under several processes all train and score, the first one writes.

    Args:
        arguments: model, data and gates.
        training: transformers' flags; ``output_dir`` holds everything the run writes.

    Raises:
        ValueError: an argument is out of range, the data doesn't fit, or the output folder holds
            another run; nothing is written then.
    """

    # The transformers class that loads this job's models.
    auto: ClassVar[Any]
    metric: str
    tokenizer: Any
    # Per stage its row in the table.
    titles: ClassVar[dict[str, str]]

    def __init__(self, arguments: Any, training: RecipeTrainingArguments) -> None:
        self.arguments = arguments
        self.training = training
        self.gate_config: GateConfig = arguments.gate_config()
        self.folder = Path(str(training.output_dir))
        identity, overwrite = self._identity(), arguments.overwrite_output_dir
        run_folder.check(self.folder, identity, overwrite=overwrite)
        self._check_resume()
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.prepare()
        with training.main_process_first(local=False):
            if training.should_save:
                run_folder.claim(self.folder, identity, overwrite=overwrite)
        if self.gate_config.budget == "latency":
            self.gate_config = replace(self.gate_config, costs=self._costs())

    @abstractmethod
    def prepare(self) -> None:
        """Load data and tokenizer, set ``metric`` and complete ``gate_config``; checks them all."""

    @abstractmethod
    def load_model(self) -> Any:
        """Return the model that every stage starts from."""

    @abstractmethod
    def trainer_fields(self) -> dict[str, Any]:
        """Return what the Trainer gets besides the model and its arguments."""

    @abstractmethod
    def score(self, model: Any) -> float:
        """Return the model's score on the evaluation data."""

    @abstractmethod
    def run(self) -> report.Report:
        """Train, remove, reload and time; writes the folder and returns its report."""

    def fresh_model(self) -> Any:
        """Return the starting model; whatever in it is random depends on the seed alone."""
        set_seed(self.training.seed)
        return self.load_model()

    def train(self, stage: str, model: Any, learning_rate: float) -> tuple[Any, report.Row]:
        """Train one stage, or load what an earlier call of the job finished.

        Returns:
            The trained model, as it loads from the stage's folder, and its row.
        """
        trained = report.trainable(model)
        folder = self.folder / stage
        finished = folder / "model"
        if not finished.is_dir():
            training = copy.copy(self.training)
            training.output_dir, training.learning_rate = str(folder), learning_rate
            kind = GatedStageTrainer if stage == "gated" else StageTrainer
            trainer = kind(model=model, args=training, **self.trainer_fields())
            checkpoint = self._checkpoint(folder)
            with quiet_about_ties(model):
                trainer.train(
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
                )
            self._finish(trainer, finished)
        self.history[stage] = TrainerState.load_from_json(str(folder / _HISTORY)).log_history
        model = self.auto.from_pretrained(finished)
        row = report.Row(
            model=self.titles[stage],
            score=self.score(model),
            trainable=trained,
            **(_budget_figures(model) if stage == "gated" else {}),
            disk=report.folder_size(finished),
            step=step_seconds(self.history[stage]),
        )
        return model, row

    def remove(self, gated: Any) -> tuple[Any, list[report.Row]]:
        """Prune the gated model, save it, and load it with nothing but transformers.

        Returns:
            The reloaded model, and the rows of the pruned and the reloaded one.

        Raises:
            RuntimeError: the reloaded model scores differently from the pruned one, or another
                fraction was removed than requested.
        """
        check_removed(gated, self.gate_config)
        pruned = prune_(copy.deepcopy(gated))
        folder = self.folder / "pruned"
        with self.training.main_process_first(local=False):
            if self.training.should_save:
                save(pruned, folder, self.tokenizer)
        reloaded = self.auto.from_pretrained(folder)
        rows = [
            report.Row(
                model=name,
                score=self.score(model),
                **_budget_figures(gated),
                removed_of_model=report.model_removal(gated, model).fraction,
                disk=report.folder_size(folder),
            )
            for name, model in (("pruned", pruned), ("reloaded", reloaded))
        ]
        first, second = (row.score for row in rows)
        # Constant predictions have no correlation, which is NaN on both sides.
        if first != second and not (math.isnan(first) and math.isnan(second)):
            raise RuntimeError(f"the reloaded model scores {second}, the pruned one {first}")
        return reloaded, rows

    def latency(self, models: dict[str, Any], inputs: dict[str, Any]) -> list[report.Timing]:
        """Time the models on the CPU, wherever they were trained; only the first process does."""
        if not self.training.should_save:
            return []
        return report.latency({name: model.cpu() for name, model in models.items()}, inputs)

    def write(self, result: report.Report, title: str) -> report.Report:
        """Write the report and its figures."""
        if self.training.should_save:
            report.write_report(self.folder / "report.json", result)
            report.plot_kept(self.folder / "kept.png", result.layers, title)
            report.plot_training(self.folder / "training.png", result, title)
        return result

    def metrics(self, model: Any, data: Any) -> dict[str, float]:
        """Return what the Trainer measures of a model on data."""
        fields = {**self.trainer_fields(), "train_dataset": None}
        trainer = Trainer(model=model, args=self.training, **fields)
        metrics: dict[str, float] = trainer.evaluate(data)
        return metrics

    def facts(self) -> dict[str, Any]:
        """Return what the report tells of the run: JSON values."""
        arguments = {f.name: getattr(self.arguments, f.name) for f in fields(self.arguments)}
        arguments.pop("overwrite_output_dir")
        shared = ["max_steps", "per_device_train_batch_size", "learning_rate", "seed"]
        if self.training.max_steps <= 0:
            shared.append("num_train_epochs")
        return {**arguments, **{name: getattr(self.training, name) for name in shared}}

    def _costs(self) -> CostTable:
        """Return this run's table of costs; an earlier call of the job has measured it, or none.

        Raises:
            ValueError: its file is damaged.
        """
        path = self.folder / _COSTS
        with self.training.main_process_first(local=False):
            if self.training.should_save and not path.exists():
                tokens = self.arguments.budget_tokens
                measured = report.measure_costs(self.fresh_model(), self.gate_config, tokens)
                report.write_costs(path, measured)
        try:
            return CostTable.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; remove it to measure again") from None

    def _identity(self) -> dict[str, Any]:
        """Return what makes two runs the same run: everything that changes the result."""
        choosing = _CHOICE if self.training.load_best_model_at_end else ()
        training = {
            name: value
            for name, value in self.training.to_dict().items()  # type: ignore[no-untyped-call]
            if name in choosing or not name.startswith(_NO_MATTER)
        }
        return {
            "job": self.facts(),
            "gate_config": self.gate_config.to_dict(),
            "training": json.loads(json.dumps(training, default=str)),
        }

    def _check_resume(self) -> None:
        named = _named_checkpoint(self.training)
        if named is None:
            return
        stages = [self.folder / stage for stage in self.titles]
        if named.parent not in stages or not named.is_dir():
            raise ValueError(
                "resume_from_checkpoint must be True or a checkpoint of this run's stages, "
                f"{self.folder}/STAGE/checkpoint-STEP, got {str(named)!r}"
            )
        if (named.parent / "model").is_dir():
            raise ValueError(
                f"resume_from_checkpoint: stage {named.parent.name!r} has ended; remove "
                f"{named.parent / 'model'} to train it again from {named.name}"
            )
        reason = damage(named, int(named.name.rpartition("-")[2]))
        if reason is not None:
            raise ValueError(f"resume_from_checkpoint: {named}: {reason}")

    def _checkpoint(self, stage: Path) -> Path | None:
        named = _named_checkpoint(self.training)
        return named if named is not None and named.parent == stage else last_complete(stage)

    def _finish(self, trainer: Trainer, folder: Path) -> None:
        """Save a trained model under a temporary name, then rename: the stage has ended."""
        temporary = _temporary(folder, clear=self.training.should_save)
        trainer.save_model(str(temporary))
        if self.training.should_save:
            (temporary / "training_args.bin").unlink()  # pickled
            self.tokenizer.save_pretrained(temporary)
            trainer.state.save_to_json(str(folder.parent / _HISTORY))
        with self.training.main_process_first(local=False):
            if self.training.should_save:
                _put(temporary, folder)


def _budget_figures(gated: nn.Module) -> dict[str, Any]:
    """Return what was requested and what is removed, as fields of a `report.Row`."""
    gates = GateMap(gated)
    config = next(iter(gates.layers.values())).config
    figures = {"removed": gates.removal().fraction}
    if config.budget == "parameters":
        return {"requested": config.sparsity, **figures}
    return {
        **figures,
        "requested_latency": config.sparsity,
        "removed_latency": gates.budgeted().fraction,
    }


def _named_checkpoint(training: RecipeTrainingArguments) -> Path | None:
    named = training.resume_from_checkpoint
    return None if named is None or named.lower() in ("true", "1") else Path(named)


def gate_all(config: GateConfig, model: nn.Module) -> GateConfig:
    """Return the config with modules named where the architecture has no default.

    Of an unknown architecture every Linear of the base model is gated, poolers and what
    ``trainable`` names left out; nothing is known of what dies together there.
    """
    if config.modules is not None or architecture_of(model).linears:
        return config
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, model)
    names = tuple(
        f"{prefix}.{name}" if base is not model else name
        for name, module in base.named_modules()
        if type(module) is nn.Linear and "pooler" not in name
    )
    _log.warning(
        "%s is an unknown architecture: all %d Linears of its base are gated; couplings: none",
        type(model).__name__,
        len(names),
    )
    return replace(config, modules=names)


def couplings(model: nn.Module) -> dict[str, Any]:
    """Return what is known of the model's blocks, for the report."""
    architecture = architecture_of(model)
    return {"architecture": architecture.family, "couplings": len(architecture.couplings)}


def check_removed(gated: nn.Module, config: GateConfig) -> None:
    """Compare what is removed with what was requested; the per-axis objective promises nothing.

    Raises:
        RuntimeError: they differ by more than 0.2 points and more than one unit.
    """
    if config.objective != "fraction":
        return
    removed, requested = GateMap(gated).budgeted().fraction, config.sparsity
    difference = abs(removed - requested)
    if difference > _TOLERANCE and difference > _largest_unit(gated):
        raise RuntimeError(
            f"{removed:.2%} of the gated {_NOUNS[config.budget]} removed, {requested:.2%} were "
            "requested: "
            "training ended before the gates' schedule, or the gates can't meet it"
        )


@torch.no_grad()
def _largest_unit(gated: nn.Module) -> float:
    """Return the largest fraction of the budget that a single gate value removes."""
    gates = GateMap(copy.deepcopy(gated))
    for gate in gates.gates():
        gate.logits.fill_(gate.config.closing_logit + 1.0)
    units = []
    for gate in gates.gates():
        gate.logits[0] -= 2.0
        units.append(gates.budgeted().fraction)
        gate.logits[0] += 2.0
    return max(units)


def save(model: Any, folder: Path, tokenizer: Any) -> None:
    """Save under a temporary name, then rename, so that a folder with the final name is whole."""
    temporary = _temporary(folder, clear=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    _put(temporary, folder)


def _temporary(folder: Path, *, clear: bool) -> Path:
    temporary = folder.with_name(f"{folder.name}.part")
    if clear:
        shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def _put(temporary: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


class _Parser(HfArgumentParser):
    """Raises what argparse would print below its usage, which is long here."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def run_command(
    job: type[Job],
    kinds: tuple[type[GateArguments], type[RecipeTrainingArguments]],
    name: str,
    words: Sequence[str] | None,
) -> None:
    """Run a recipe from command-line words; None takes those of the process.

    Raises:
        ValueError: a flag or an argument is wrong.
    """
    parser = _Parser(kinds, prog=f"finegates {name}")  # type: ignore[arg-type]
    arguments, training = parser.parse_args_into_dataclasses(words)
    recipe = job(arguments, training)
    result = recipe.run()
    if not training.should_save:
        return
    console = Console()
    console.print(report.table(result))
    for line in report.lines(result):
        console.print(line, highlight=False)
    console.print(f"report.json, the figures and pruned/ are in {recipe.folder}")
