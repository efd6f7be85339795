"""Fine-tune and sparsify an encoder on a classification task: the main job, `finegates finetune`.

Three adaptations of the same model at the same number of steps (``adapted``: head and biases with
nothing removed; ``dense``: full fine-tuning; ``gated``: gates, head and biases), then removal, a
reload through plain transformers, one table, ``report.json`` and figures. Every stage checkpoints;
the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from .. import report
from ..surgery import freeze_, gate_
from .arguments import FinetuneArguments, FinetuneTrainingArguments
from .data import load_data
from .job import Job, couplings, gate_all, run_command
from .models import load_classifier, load_tokenizer
from .scores import compute_metrics
from .tokens import tokenize

_log = logging.getLogger("finegates")
_BATCHES = (1, 32)


class Finetune(Job):
    """One run of the job; see `Job` for arguments and errors."""

    auto: ClassVar[Any] = AutoModelForSequenceClassification
    titles: ClassVar[dict[str, str]] = {
        "adapted": "head + biases", "dense": "full fine-tuning", "gated": "gated"
    }  # fmt: skip

    def prepare(self) -> None:
        """Load and tokenize the data; a new pooler is trained in every arm."""
        self.task, data = load_data(self.arguments.dataset, self.arguments.data_dir)
        self.metric = self.task.metric
        for split, rows in data.items():
            if len(rows) == 0:
                raise ValueError(f"split {split!r} of {self.task.name} must not be empty")
        name = self.arguments.model
        self.tokenizer = load_tokenizer(name)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        model, new = load_classifier(self.task, name)
        if new:
            _log.warning("model %r has no pooler; a random one is trained as head", name)
        # A random pooler is worth nothing frozen: it is part of the head, in every arm.
        trainable = (*self.gate_config.trainable, *new)
        self.gate_config = gate_all(replace(self.gate_config, trainable=trainable), model)
        self.data = tokenize(
            data, self.tokenizer, self.task, self.arguments.max_length, model.config
        )

    def run(self) -> report.Report:
        """Train, remove, reload and time; writes the folder and returns its report.

        Raises:
            RuntimeError: as `Job.remove` does.
        """
        rate = self.training.learning_rate
        adapted = freeze_(self.fresh_model(), self.gate_config)
        _, adapted_row = self.train("adapted", adapted, rate)
        dense, dense_row = self.train(
            "dense", self.fresh_model(), self.arguments.dense_learning_rate
        )
        gated, gated_row = self.train("gated", gate_(self.fresh_model(), self.gate_config), rate)
        reloaded, removed_rows = self.remove(gated)
        others = [split for split in self.data if split not in ("train", "validation")]
        splits = {split: self.score(reloaded, split) for split in others}
        sizes = sorted({min(size, len(self.data["validation"])) for size in _BATCHES})
        timings = self.latency(
            {dense_row.model: dense, removed_rows[-1].model: reloaded},
            {f"batch {size}": self._inputs(size) for size in sizes},
        )
        result = report.Report(
            job={**self.facts(), **couplings(reloaded)},
            metric=self.metric,
            rows=[adapted_row, dense_row, gated_row, *removed_rows],
            timings=timings,
            layers=report.kept(gated, reloaded),
            splits=splits,
            history=self.history,
        )
        removed = removed_rows[0].removed
        return self.write(
            result, f"{self.arguments.model}, {removed:.1%} of the gated weights removed"
        )

    def load_model(self) -> Any:
        """Return the classifier with a new head."""
        return load_classifier(self.task, self.arguments.model)[0]

    def trainer_fields(self) -> dict[str, Any]:
        """Return the tokenized splits, the collator and the task's metrics."""
        return {
            "train_dataset": self.data["train"],
            "eval_dataset": self.data["validation"],
            "data_collator": self.collator,
            "compute_metrics": compute_metrics(self.task),
        }

    def score(self, model: Any, split: str = "validation") -> float:
        """Return the task's deciding metric on a split."""
        return self.metrics(model, self.data[split])[f"eval_{self.metric}"]

    def _inputs(self, batch: int) -> dict[str, Any]:
        """Return the validation split's first ``batch`` examples, padded together."""
        examples = [
            {key: value for key, value in self.data["validation"][i].items() if key != "labels"}
            for i in range(batch)
        ]
        return dict(self.collator(examples))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the job from command-line words; None takes those of the process.

    Raises:
        ValueError: a flag or an argument is wrong.
    """
    run_command(Finetune, (FinetuneArguments, FinetuneTrainingArguments), "finetune", arguments)
