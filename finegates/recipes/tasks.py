"""What a task is, and how its splits are held: for every source of text-classification data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TaskSpec:
    """What a task reads and how it is scored.

    Args:
        name: as users write it, for instance ``"sst2"``.
        text_columns: one column, or two for sentence pairs.
        label_names: in the order of the class indices; None for regression.
        metrics: keys of `METRICS`; the first is the task's score.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.metrics[0]


def decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Yield (number from 1, line with its end); only ``\n`` ends a line.

    Raises:
        ValueError: a line is no UTF-8; names file and line.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} line {number}: not UTF-8 ({error.reason})") from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line without its end) of the lines that aren't blank."""
    for number, line in decoded_lines(path):
        if line.strip():
            yield number, line.rstrip("\r\n")


def dataset_dict(task: TaskSpec, splits: Mapping[str, list[tuple[Any, ...]]]) -> Any:
    import datasets

    label = (
        datasets.Value("float32")
        if task.label_names is None
        else datasets.ClassLabel(names=list(task.label_names))
    )
    columns = {name: datasets.Value("string") for name in task.text_columns}
    features = datasets.Features({**columns, "label": label})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {name: [row[i] for row in rows] for i, name in enumerate(features)}, features
            )
            for split, rows in splits.items()
        }
    )
