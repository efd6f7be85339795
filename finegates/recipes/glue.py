"""GLUE from local folders in the benchmark's original layout, or from the hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tasks import TaskSpec, dataset_dict, read_lines

_log = logging.getLogger("finegates")


@dataclass(frozen=True)
class _Layout:
    """A GLUE task and where its original TSV files keep it.

    Args:
        columns: header names of the texts and the label, or their positions without a header.
        labels: the label strings in the files, in class order; None for regression.
        validation: split name and file of every development set.
        lenient: whether lines with too few fields are skipped with a warning.
    """

    task: TaskSpec
    folder: str
    columns: tuple[str | int, ...]
    labels: tuple[str, ...] | None
    validation: tuple[tuple[str, str], ...] = (("validation", "dev.tsv"),)
    lenient: bool = False


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")
_PARAPHRASE = ("not_equivalent", "equivalent")
_QUESTIONS = ("question1", "question2")
# Columns and classes are named and ordered as in the hub's nyu-mll/glue; metrics are the
# benchmark's own (Wang et al. 2019, arXiv 1804.07461, table 1).
_LAYOUTS = (
    # CoLA's files have no header: source, label, the author's mark, sentence.
    _Layout(TaskSpec("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
            "CoLA", (3, 1), _BINARY),
    _Layout(TaskSpec("sst2", ("sentence",), ("negative", "positive")),
            "SST-2", ("sentence", "label"), _BINARY),
    _Layout(TaskSpec("mrpc", _PAIR, _PARAPHRASE, ("accuracy", "f1")),
            "MRPC", ("#1 String", "#2 String", "Quality"), _BINARY),
    # About twenty of QQP's lines were cut before their last fields when GLUE was released.
    _Layout(TaskSpec("qqp", _QUESTIONS, ("not_duplicate", "duplicate"), ("accuracy", "f1")),
            "QQP", (*_QUESTIONS, "is_duplicate"), _BINARY, lenient=True),
    _Layout(TaskSpec("stsb", _PAIR, None, ("pearson", "spearman")),
            "STS-B", (*_PAIR, "score"), None),
    _Layout(TaskSpec("mnli", ("premise", "hypothesis"), _NLI),
            "MNLI", (*_PAIR, "gold_label"), _NLI,
            (("validation", "dev_matched.tsv"), ("validation_mismatched", "dev_mismatched.tsv"))),
    _Layout(TaskSpec("qnli", ("question", "sentence"), _ENTAILMENT),
            "QNLI", ("question", "sentence", "label"), _ENTAILMENT),
    _Layout(TaskSpec("rte", _PAIR, _ENTAILMENT), "RTE", (*_PAIR, "label"), _ENTAILMENT),
    _Layout(TaskSpec("wnli", _PAIR, ("not_entailment", "entailment")),
            "WNLI", (*_PAIR, "label"), _BINARY),
)  # fmt: skip
GLUE: Mapping[str, TaskSpec] = {layout.task.name: layout.task for layout in _LAYOUTS}


def load_glue_folder(data_dir: str, task: str | None = None) -> tuple[TaskSpec, Any]:
    """Load a GLUE task from the benchmark's original TSV files.

    ``test`` exists where ``test_labelled.tsv`` does; the benchmark's own test labels are secret.

    Args:
        data_dir: the task's folder, or with ``task`` the folder above it.
        task: a key of `GLUE`; None takes the folder's name (``SST-2``, ``MRPC``, ...).

    Raises:
        ValueError: the folder tells no task, or a line doesn't fit; names file and line.
    """
    root = Path(data_dir)
    if task is None:
        by_folder = {layout.folder.lower(): layout for layout in _LAYOUTS}
        layout = by_folder.get(root.resolve().name.lower())
        if layout is None:
            folders = ", ".join(layout.folder for layout in _LAYOUTS)
            raise ValueError(
                f"data_dir must be a folder named {folders}, or dataset must name the task, "
                f"got {data_dir!r}"
            )
    else:
        layout = next(layout for layout in _LAYOUTS if layout.task.name == task)
        if not (root / "train.tsv").is_file() and (root / layout.folder).is_dir():
            root = root / layout.folder
    files = {"train": "train.tsv", **dict(layout.validation)}
    if (root / "test_labelled.tsv").is_file():
        files["test"] = "test_labelled.tsv"
    splits = {}
    for split, name in files.items():
        if not (root / name).is_file():
            raise ValueError(f"data_dir: {root / name} is not a file")
        splits[split] = list(_read_tsv(root / name, layout))
    return layout.task, dataset_dict(layout.task, splits)


def load_glue_hub(task: str) -> tuple[TaskSpec, Any]:
    """Load a GLUE task from the hub's ``nyu-mll/glue``, without its unlabelled test split.

    Raises:
        ValueError: the hub's columns or labels are others than the task's.
        OSError: the hub can't be reached.
    """
    import datasets

    try:
        data = datasets.load_dataset("nyu-mll/glue", task)
    except Exception as error:  # hub errors have no common class besides Exception
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"dataset 'glue:{task}' can't be loaded from the hub: {reason}") from error
    names = {"validation_matched": "validation"}
    spec = GLUE[task]
    columns = [*spec.text_columns, "label"]
    for split, rows in data.items():
        missing = [column for column in columns if column not in rows.column_names]
        if missing:
            raise ValueError(
                f"dataset 'glue:{task}': split {split!r} must have a column {missing[0]!r}, "
                f"got {', '.join(rows.column_names)}"
            )
        labels = getattr(rows.features["label"], "names", None)
        if labels is not None and tuple(labels) != spec.label_names:
            raise ValueError(
                f"dataset 'glue:{task}': labels must be {spec.label_names}, got {tuple(labels)}"
            )
    splits = {
        names.get(split, split): rows.select_columns(columns)
        for split, rows in data.items()
        if not split.startswith("test")
    }
    return spec, datasets.DatasetDict(splits)


def _read_tsv(path: Path, layout: _Layout) -> Iterator[tuple[Any, ...]]:
    """Yield texts and label of every line; quotes are plain characters."""
    lines = read_lines(path)
    positions = [c for c in layout.columns if isinstance(c, int)]
    if not positions:
        _, first = next(lines, (1, ""))
        header = first.split("\t")
        for column in layout.columns:
            if column not in header:
                raise ValueError(f"{path} line 1: header must have {column!r}, got {header}")
        positions = [header.index(str(column)) for column in layout.columns]
    short = []
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) <= max(positions):
            if not layout.lenient:
                raise ValueError(
                    f"{path} line {number}: must have at least {max(positions) + 1} fields, "
                    f"got {len(fields)}"
                )
            short.append(number)
            continue
        *texts, label = (fields[position] for position in positions)
        yield (*texts, _label(label, layout.labels, path, number))
    if short:
        _log.warning("%s: %d short lines skipped, first line %d", path, len(short), short[0])


def _label(text: str, labels: tuple[str, ...] | None, path: Path, number: int) -> int | float:
    try:
        return float(text) if labels is None else labels.index(text)
    except ValueError:
        what = "a number" if labels is None else f"one of {', '.join(labels)}"
        raise ValueError(f"{path} line {number}: label must be {what}, got {text!r}") from None
