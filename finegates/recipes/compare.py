"""Compare methods at equal steps, `finegates compare`: a plan's runs, one JSON line each.

A plan is JSON: ``{"common": {...}, "rows": [{...}, ...]}``. Every row, completed by ``common``, is
one or more runs: a list stands for each of its values (seeds, rates, sparsities). Keys are those of
`Run` and the fields of `GateConfig`. Finished runs are in the results file and aren't run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorWithPadding, TrainingArguments, set_seed

from .. import report
from ..config import GateConfig
from ..gates import Gate
from ..nn import FusedGatedLinear
from ..surgery import GateMap, prune_
from .data import load_data
from .methods import METHODS, trainer_class
from .models import DEFAULT_MODEL, load_classifier, load_tokenizer
from .scores import compute_metrics
from .tokens import tokenize

_CALIBRATION = 8  # batches


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        dataset: as `load_data` takes it.
        method: a key of `METHODS`.
        learning_rate: of everything but the gates' logits.
        bf16: whether products run in bfloat16 (autocast); parameters stay in fp32.
        gates: fields of `GateConfig` that differ from its defaults, or from `GateConfig.paper`'s
            with the method ``"paper"``.

    Raises:
        ValueError: the method is unknown, or a field of the gates is wrong.
    """

    dataset: str
    method: str
    learning_rate: float
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
        missing = sorted({"dataset", "method", "learning_rate"} - set(values))
        if unknown or missing:
            raise ValueError(f"a row of the plan has unknown keys {unknown}, lacks {missing}")
        return cls(
            **{key: value for key, value in values.items() if key in own},
            gates={key: value for key, value in values.items() if key in theirs},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the flat values that `from_dict` takes."""
        values = dataclasses.asdict(self)
        gates = values.pop("gates")
        return {**values, **gates}

    def gate_config(self, trainable: Sequence[str] = ()) -> GateConfig:
        """Return the gates' config, with further trainable parameters."""
        paper = self.method == "paper"
        config = GateConfig.paper(**self.gates) if paper else GateConfig(**self.gates)
        return dataclasses.replace(config, trainable=(*config.trainable, *trainable))


def read_plan(path: Path) -> list[Run]:
    """Return the runs of a plan in its order, seeds outermost, so that each seed ends a table.

    Raises:
        ValueError: the plan isn't JSON of the form this module describes.
    """
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        common, rows = plan.get("common", {}), plan["rows"]
        runs = [Run.from_dict(values) for row in rows for values in _expand({**common, **row})]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return sorted(runs, key=lambda run: run.seed)


def _expand(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    choices = [value if isinstance(value, list) else [value] for value in row.values()]
    for values in itertools.product(*choices):
        yield dict(zip(row, values, strict=True))


def execute(run: Run, data_dir: str | None = None) -> dict[str, Any]:
    """Train, remove and score one run; return its line: the run, scores and counts.

    Scores are those of the model after removal. ``trained`` counts the trained parameters by kind.
    """
    task, tokenizer, data = _data(run.dataset, data_dir, run.model, run.max_length)
    started = time.process_time()
    set_seed(run.seed)
    model, new = load_classifier(task, run.model)
    config = run.gate_config(new)
    collator = DataCollatorWithPadding(tokenizer)
    examples = [data["train"][i] for i in range(min(len(data["train"]), 32 * _CALIBRATION))]
    batches = [collator(examples[i : i + 32]) for i in range(0, len(examples), 32)]
    total = report.parameters(model)
    model = METHODS[run.method](model, config, batches)
    trained = _trained(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(model)(
            model=model,
            args=_training(run, folder),
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            data_collator=collator,
            compute_metrics=compute_metrics(task),
        )
        loss = trainer.train().training_loss
        removed = removed_of_model = 0.0
        if any(isinstance(module, FusedGatedLinear) for module in model.modules()):
            removed = GateMap(model).removal().fraction
            removed_of_model = report.model_removal(model, model).fraction
            prune_(model)
        metrics = trainer.evaluate()
    return {
        "run": run.to_dict(),
        "scores": {name: metrics[f"eval_{name}"] for name in task.metrics},
        "loss": loss,
        "removed": removed,
        "removed_of_model": removed_of_model,
        "parameters": total,
        "trained": trained,
        "cpu_seconds": round(time.process_time() - started),
    }


@cache
def _data(dataset: str, data_dir: str | None, model: str, max_length: int) -> Any:
    task, data = load_data(dataset, data_dir)
    tokenizer = load_tokenizer(model)
    return task, tokenizer, tokenize(data, tokenizer, task, max_length)


def _training(run: Run, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=run.max_steps,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=run.learning_rate,
        seed=run.seed,
        bf16=run.bf16,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=False,
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


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file, none without one.

    Raises:
        ValueError: a line isn't JSON; names it.
    """
    lines = []
    if path.exists():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except ValueError:
                raise ValueError(f"{path} line {number}: not JSON; delete it to go on") from None
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what a plan still lacks, then print its table.

    Raises:
        ValueError: the plan or the results file doesn't read.
    """
    parser = argparse.ArgumentParser(prog="finegates compare", description=__doc__)
    parser.add_argument("plan", type=Path, help="JSON file; docs/experiments has ours")
    parser.add_argument("--data_dir", help="folder of GLUE tasks in their original TSV layout")
    parser.add_argument("--results", type=Path, help="default: the plan's name with .jsonl")
    parser.add_argument("--table", action="store_true", help="run nothing, print what there is")
    parser.add_argument("--figure", type=Path, help="PNG of the scores against what is removed")
    chosen = parser.parse_args(arguments)
    results = chosen.results or chosen.plan.with_suffix(".jsonl")
    runs = read_plan(chosen.plan)
    finished = [line["run"] for line in read_results(results)]
    for run in () if chosen.table else runs:
        if run.to_dict() not in finished:
            line = json.dumps(execute(run, chosen.data_dir))
            with results.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            sys.stdout.write(line + "\n")
    lines = read_results(results)
    sys.stdout.write(report.spread_table(lines) + "\n")
    if chosen.figure is not None:
        report.plot_spread(chosen.figure, lines)


if __name__ == "__main__":
    main()
