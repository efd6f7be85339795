"""The metrics of GLUE, as its authors score them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .tasks import TaskSpec


def _correlation(name: str) -> Callable[[Any, Any], float]:
    def score(labels: Any, predictions: Any) -> float:
        from scipy import stats

        with warnings.catch_warnings():
            # Constant predictions have no correlation; the NaN says so.
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
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
        >>> task = TaskSpec("reviews", ("sentence",), ("negative", "positive"))
        >>> scores(task, [[0.0, 1.0], [1.0, 0.0]], [1, 1])
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
