"""Fine-tune and sparsify an encoder on a classification task: the main job, `finegates finetune`.

Three adaptations of the same model at the same number of steps (``adapted``: head and biases with
nothing removed; ``dense``: full fine-tuning; ``gated``: gates, head and biases), then removal, a
reload through plain transformers, one table, ``report.json`` and a figure. Every stage checkpoints;
the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from .. import report
from ..config import GateConfig
from ..hf.trainer import GatedTrainer
from ..surgery import GateMap, freeze_, gate_, prune_
from ..surgery.record import tied_logits
from . import run_folder
from .arguments import FinetuneArguments, FinetuneTrainingArguments
from .checkpoints import last_complete
from .data import load_data
from .models import load_classifier, load_tokenizer
from .scores import compute_metrics
from .tokens import tokenize

_log = logging.getLogger("finegates")
_BATCHES = (1, 32)
# What is removed may differ from what was requested by half a point, or one unit.
_TOLERANCE = 0.005
# Training arguments that leave the result alone: paths, logs, progress, saving, the hub, ranks.
_NO_MATTER = (
    "dataloader_num_workers", "dataloader_persistent", "dataloader_pin", "dataloader_prefetch",
    "ddp_timeout", "debug", "disable_tqdm", "do_", "enable_jit_checkpoint", "hub_", "local_rank",
    "log_", "logging_", "output_dir", "project", "push_to_hub", "report_to",
    "resume_from_checkpoint", "run_name", "save_", "skip_memory_metrics", "torch_empty_cache",
    "trackio_",
)  # fmt: skip
_ROWS = {"adapted": "head + biases", "dense": "full fine-tuning", "gated": "gated"}


class Finetune:
    """One run of the job.

    Args:
        arguments: model, data and gates.
        training: transformers' flags; ``output_dir`` holds everything the run writes.

    Raises:
        ValueError: an argument is out of range, a split is empty, or the output folder holds
            another run; nothing is written then.
    """

    def __init__(self, arguments: FinetuneArguments, training: FinetuneTrainingArguments) -> None:
        self.arguments = arguments
        self.training = training
        self.gate_config = arguments.gate_config()
        self.folder = Path(str(training.output_dir))
        identity, overwrite = self._identity(), arguments.overwrite_output_dir
        run_folder.check(self.folder, identity, overwrite=overwrite)
        self.task, data = load_data(arguments.dataset, arguments.data_dir)
        for split, rows in data.items():
            if len(rows) == 0:
                raise ValueError(f"split {split!r} of {self.task.name} must not be empty")
        self.tokenizer = load_tokenizer(arguments.model)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        model, new = load_classifier(self.task, arguments.model)
        if new:
            _log.warning("model %r has no pooler; a random one is trained as head", arguments.model)
        # A random pooler is worth nothing frozen: it is part of the head, in every arm.
        trainable = (*self.gate_config.trainable, *new)
        self.gate_config = replace(self.gate_config, trainable=trainable)
        self.data = tokenize(data, self.tokenizer, self.task, arguments.max_length, model.config)
        run_folder.claim(self.folder, identity, overwrite=overwrite)

    def run(self) -> report.Report:
        """Train, remove, reload and time; writes the folder and returns its report.

        Raises:
            RuntimeError: the reloaded model scores differently from the pruned one, or another
                fraction was removed than requested.
        """
        rate = self.training.learning_rate
        adapted = freeze_(self._fresh_model(), self.gate_config)
        _, adapted_row = self._train("adapted", adapted, rate)
        dense, dense_row = self._train(
            "dense", self._fresh_model(), self.arguments.dense_learning_rate
        )
        gated, gated_row = self._train("gated", gate_(self._fresh_model(), self.gate_config), rate)
        _check_removed(gated, self.gate_config)
        pruned = prune_(copy.deepcopy(gated))
        folder = self.folder / "pruned"
        _save(pruned, folder, self.tokenizer)
        reloaded = AutoModelForSequenceClassification.from_pretrained(folder)
        pruned_row, reloaded_row = (
            report.Row(
                model=name,
                score=self._score(model),
                trainable=None,
                requested=self.gate_config.sparsity,
                removed=GateMap(gated).removal().fraction,
                removed_of_model=report.model_removal(gated, model).fraction,
                disk=report.folder_size(folder),
            )
            for name, model in (("pruned", pruned), ("reloaded", reloaded))
        )
        if not _same(reloaded_row.score, pruned_row.score):
            raise RuntimeError(
                f"the reloaded model scores {reloaded_row.score}, the pruned one {pruned_row.score}"
            )
        others = [split for split in self.data if split not in ("train", "validation")]
        splits = {split: self._score(reloaded, split) for split in others}
        sizes = sorted({min(size, len(self.data["validation"])) for size in _BATCHES})
        # The table is the CPU's, wherever the models were trained.
        timings = report.latency(
            {dense_row.model: dense.cpu(), reloaded_row.model: reloaded.cpu()},
            {f"batch {size}": self._inputs(size) for size in sizes},
        )
        layers = report.kept(gated, reloaded)
        result = report.Report(
            job=self._job(),
            metric=self.task.metric,
            rows=[adapted_row, dense_row, gated_row, pruned_row, reloaded_row],
            timings=timings,
            layers=layers,
            splits=splits,
        )
        report.write_report(self.folder / "report.json", result)
        title = f"{self.arguments.model}, {pruned_row.removed:.1%} of the gated weights removed"
        report.plot_kept(self.folder / "kept.png", layers, title)
        return result

    def _train(self, stage: str, model: Any, learning_rate: float) -> tuple[Any, report.Row]:
        """Train one stage, or load what an earlier call of the job finished."""
        trained = report.trainable(model)
        folder = self.folder / stage
        finished = folder / "model"
        if finished.is_dir():
            model = AutoModelForSequenceClassification.from_pretrained(finished)
        else:
            training = copy.copy(self.training)
            training.output_dir, training.learning_rate = str(folder), learning_rate
            kind = GatedTrainer if stage == "gated" else Trainer
            checkpoint = last_complete(folder)
            trainer = self._trainer(kind, model, training)
            with _quiet_about(list(tied_logits(model))):
                trainer.train(
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
                )
            _save(model, finished, self.tokenizer)
        gates = GateMap(model).removal() if stage == "gated" else None
        row = report.Row(
            model=_ROWS[stage],
            score=self._score(model),
            trainable=trained,
            requested=None if gates is None else self.gate_config.sparsity,
            removed=None if gates is None else gates.fraction,
            removed_of_model=None,
            disk=report.folder_size(finished),
        )
        return model, row

    def _trainer(self, kind: type[Trainer], model: Any, training: TrainingArguments) -> Trainer:
        return kind(
            model=model,
            args=training,
            train_dataset=self.data["train"],
            eval_dataset=self.data["validation"],
            data_collator=self.collator,
            compute_metrics=compute_metrics(self.task),
        )

    def _score(self, model: Any, split: str = "validation") -> float:
        metrics = self._trainer(Trainer, model, self.training).evaluate(self.data[split])
        return float(metrics[f"eval_{self.task.metric}"])

    def _inputs(self, batch: int) -> dict[str, Any]:
        """Return the validation split's first ``batch`` examples, padded together."""
        examples = [
            {key: value for key, value in self.data["validation"][i].items() if key != "labels"}
            for i in range(batch)
        ]
        return dict(self.collator(examples))

    def _fresh_model(self) -> Any:
        set_seed(self.training.seed)
        model, _ = load_classifier(self.task, self.arguments.model)
        return model

    def _job(self) -> dict[str, Any]:
        """Return what the report tells of the run."""
        arguments = {f.name: getattr(self.arguments, f.name) for f in fields(self.arguments)}
        arguments.pop("overwrite_output_dir")
        shared = ["max_steps", "per_device_train_batch_size", "learning_rate", "seed"]
        if self.training.max_steps <= 0:
            shared.append("num_train_epochs")
        return {**arguments, **{name: getattr(self.training, name) for name in shared}}

    def _identity(self) -> dict[str, Any]:
        """Return what makes two runs the same run: everything that changes the result."""
        training = {
            name: value
            for name, value in self.training.to_dict().items()  # type: ignore[no-untyped-call]
            if not name.startswith(_NO_MATTER)
        }
        return {
            "job": self._job(),
            "gate_config": self.arguments.gate_config().to_dict(),
            "training": json.loads(json.dumps(training, default=str)),
        }


def _same(first: float, second: float) -> bool:
    """Compare scores; constant predictions have no correlation, which is NaN on both sides."""
    return first == second or (math.isnan(first) and math.isnan(second))


def _check_removed(gated: Any, config: GateConfig) -> None:
    """Compare what is removed with what was requested; the per-axis objective promises nothing.

    Raises:
        RuntimeError: they differ by more than half a point and more than one unit.
    """
    if config.objective != "fraction":
        return
    removed, requested = GateMap(gated).removal().fraction, config.sparsity
    difference = abs(removed - requested)
    if difference > _TOLERANCE and difference > _largest_unit(gated):
        raise RuntimeError(
            f"{removed:.2%} of the gated weights are removed, {requested:.2%} were requested: "
            "training ended before the gates' schedule, or the gates can't meet it"
        )


@torch.no_grad()
def _largest_unit(gated: Any) -> float:
    """Return the largest fraction of the gated weights that a single gate value removes."""
    gates = GateMap(copy.deepcopy(gated))
    for gate in gates.gates():
        gate.logits.fill_(gate.config.closing_logit + 1.0)
    units = []
    for gate in gates.gates():
        gate.logits[0] -= 2.0
        units.append(gates.removal().fraction)
        gate.logits[0] += 2.0
    return max(units)


@contextmanager
def _quiet_about(tied: list[str]) -> Iterator[None]:
    """Hide the Trainer's warning that a checkpoint lacks the further names of tied logits."""
    expected = f"There were missing keys in the checkpoint model loaded: {tied}."
    logger = logging.getLogger("transformers.trainer")

    def other(record: logging.LogRecord) -> bool:
        return record.getMessage() != expected

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _save(model: Any, folder: Path, tokenizer: Any) -> None:
    """Save under a temporary name, then rename, so that a folder with the final name is whole."""
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


class _Parser(HfArgumentParser):
    """Raises what argparse would print below its usage, which is long here."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the job from command-line words; None takes those of the process.

    Raises:
        ValueError: a flag or an argument is wrong.
    """
    kinds: Any = (FinetuneArguments, FinetuneTrainingArguments)
    parser = _Parser(kinds, prog="finegates finetune")
    chosen, training = parser.parse_args_into_dataclasses(arguments)
    job = Finetune(chosen, training)
    result = job.run()
    console = Console()
    console.print(report.table(result))
    for split, score in result.splits.items():
        console.print(f"{split}: {result.metric} {score:.1%} (reloaded)")
    console.print(f"report.json, kept.png and pruned/ are in {job.folder}")
