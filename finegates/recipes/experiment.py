"""One run of a comparison: a method on a task or a text, for a number of steps, from a seed."""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DataCollatorWithPadding,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from .. import report
from ..config import GateConfig
from ..gates import Gate
from ..nn import FusedGatedLinear
from ..surgery import GateMap, prune_
from .arguments import TextArguments
from .data import load_data
from .methods import METHODS, Batches, trainer_class
from .models import DEFAULT_MODEL, load_causal_lm, load_classifier, load_tokenizer
from .scores import compute_metrics
from .text import load_text
from .tokens import tokenize

# Examples that one-shot methods look at.
_CALIBRATION = 256


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        method: a key of `METHODS`.
        learning_rate: of everything but the gates' logits.
        dataset: of a classification task, as `load_data` takes it.
        train_file, validation_file: of a language model's text, instead of a dataset.
        max_steps: 0 trains nothing.
        max_length: tokens per example, exactly for texts.
        bf16: whether products run in bfloat16 (autocast); parameters stay in fp32.
        gates: fields of `GateConfig` that differ from its defaults, or from `GateConfig.paper`'s
            with the method ``"paper"``.

    Raises:
        ValueError: the method is unknown, a field of the gates is wrong, or the data is named
            neither way or both.
    """

    method: str
    learning_rate: float
    dataset: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    seed: int = 0
    model: str = DEFAULT_MODEL
    max_steps: int = 450
    batch_size: int = 32
    max_length: int = 128
    bf16: bool = False
    gates: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if (self.dataset is None) == (self.train_file is None):
            raise ValueError(
                f"one of dataset and train_file must be given, got {self.dataset!r} and "
                f"{self.train_file!r}"
            )
        self.gate_config()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        """Build a run from flat values: fields of `Run` and of `GateConfig` side by side.

        Raises:
            ValueError: a key is neither's, or one that a run needs is missing.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"gates"}
        theirs = {field.name for field in dataclasses.fields(GateConfig)}
        unknown = sorted(set(values) - own - theirs)
        missing = sorted({"method", "learning_rate"} - set(values))
        if unknown or missing:
            raise ValueError(f"a row of the plan has unknown keys {unknown}, lacks {missing}")
        return cls(
            **{key: value for key, value in values.items() if key in own},
            gates={key: value for key, value in values.items() if key in theirs},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the flat values that `from_dict` takes, without those that are None."""
        values = dataclasses.asdict(self)
        values.update(values.pop("gates"))
        return {key: value for key, value in values.items() if value is not None}

    def gate_config(self, trainable: Sequence[str] = ()) -> GateConfig:
        """Return the gates' config, with further trainable parameters."""
        paper = self.method == "paper"
        config = GateConfig.paper(**self.gates) if paper else GateConfig(**self.gates)
        return dataclasses.replace(config, trainable=(*config.trainable, *trainable))


@dataclass(frozen=True)
class _Problem:
    """What a run trains on and is scored by.

    Args:
        load: returns the pretrained model and the names of its new parameters outside the head.
        train, validation, collator: as transformers' Trainer takes them.
        options: further fields of TrainingArguments.
        compute_metrics: as the Trainer takes it; None for texts.
        names: of the scores, the deciding one first.
    """

    load: Callable[[], tuple[Any, tuple[str, ...]]]
    train: Any
    validation: Any
    collator: Any
    options: Mapping[str, Any]
    compute_metrics: Any
    names: tuple[str, ...]

    def calibration(self, batch_size: int) -> Batches:
        """Return the first training examples in batches."""
        examples = list(islice(iter(self.train), _CALIBRATION))
        starts = range(0, len(examples), batch_size)
        return [self.collator(examples[start : start + batch_size]) for start in starts]

    def scores(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the scores from what the Trainer's evaluation returned."""
        found = {**metrics, "eval_perplexity": math.exp(metrics["eval_loss"])}
        return {name: found[f"eval_{name}"] for name in self.names}


@cache
def _task(dataset: str, data_dir: str | None, model: str, max_length: int) -> _Problem:
    task, data = load_data(dataset, data_dir)
    tokenizer = load_tokenizer(model)
    data = tokenize(data, tokenizer, task, max_length)
    return _Problem(
        lambda: load_classifier(task, model),
        data["train"],
        data["validation"],
        DataCollatorWithPadding(tokenizer),
        {"train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 64},
        compute_metrics(task),
        task.metrics,
    )


def _text(run: Run, data_dir: str | None) -> _Problem:
    folder = Path(data_dir or "")
    train, validation = (
        None if name is None else str(folder / name)
        for name in (run.train_file, run.validation_file)
    )
    name = str(folder / run.model) if (folder / run.model).is_dir() else run.model
    arguments = TextArguments(
        train_file=train, validation_file=validation, block_size=run.max_length
    )
    config = load_causal_lm(name).config
    text = load_text(arguments, load_tokenizer(name), config, run.seed)
    return _Problem(
        lambda: (load_causal_lm(name), ()),
        text.train,
        text.validation,
        default_data_collator,
        {"prediction_loss_only": True, "per_device_eval_batch_size": run.batch_size},
        None,
        ("perplexity",),
    )


def execute(run: Run, data_dir: str | None = None) -> dict[str, Any]:
    """Train, remove and score one run; return its line: the run, scores and counts.

    Scores are those of the model after removal. ``trained`` counts the trained parameters by kind.

    Args:
        run: what to do.
        data_dir: folder of the data; a run's files, and a model that is a folder of it, lie there.
    """
    if run.dataset is None:
        problem = _text(run, data_dir)
    else:
        problem = _task(run.dataset, data_dir, run.model, run.max_length)
    started = time.process_time()
    set_seed(run.seed)
    model, new = problem.load()
    config = run.gate_config(new)
    total = report.parameters(model)
    model = METHODS[run.method](model, config, problem.calibration(run.batch_size))
    trained = _trained(model)
    loss = removed = removed_of_model = 0.0
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(model)(
            model=model,
            args=_training(run, problem.options, folder),
            train_dataset=problem.train,
            eval_dataset=problem.validation,
            data_collator=problem.collator,
            compute_metrics=problem.compute_metrics,
        )
        if run.max_steps > 0:
            loss = trainer.train().training_loss
        if any(isinstance(module, FusedGatedLinear) for module in model.modules()):
            removed = GateMap(model).removal().fraction
            removed_of_model = report.model_removal(model, model).fraction
            prune_(model)
        metrics = trainer.evaluate()
    return {
        "run": run.to_dict(),
        "scores": problem.scores(metrics),
        "loss": loss,
        "removed": removed,
        "removed_of_model": removed_of_model,
        "parameters": total,
        "trained": trained,
        "cpu_seconds": round(time.process_time() - started),
    }


def _training(run: Run, options: Mapping[str, Any], folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=max(run.max_steps, 1),  # the Trainer wants a step, also where it only scores
        per_device_train_batch_size=run.batch_size,
        learning_rate=run.learning_rate,
        seed=run.seed,
        bf16=run.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=False,
        **options,
    )


def _trained(model: Any) -> dict[str, int]:
    """Count trained parameters by kind; shared ones once."""
    gates = {id(m.logits) for m in model.modules() if isinstance(m, Gate)}
    counts = {"gates": 0, "lora": 0, "head": 0, "biases": 0, "weights": 0}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in gates:
            kind = "gates"
        elif "lora" in name:
            kind = "lora"
        elif name.startswith(("classifier", "score")):
            kind = "head"
        else:
            kind = "biases" if name.endswith("bias") else "weights"
        counts[kind] += parameter.numel()
    return counts
