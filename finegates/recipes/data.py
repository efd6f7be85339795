"""Text-classification data by name: movie reviews by default, GLUE from folders or the hub.

Every loader returns a `TaskSpec` and a ``datasets.DatasetDict`` with the splits ``train`` and
``validation`` (and ``test`` where it is labelled), whose columns are the task's texts and ``label``
(a class index, or a float for regression).
"""

from __future__ import annotations

from typing import Any

from .glue import GLUE, load_glue_folder, load_glue_hub
from .movie_reviews import DEFAULT_DATASET, MOVIE_REVIEWS, load_movie_reviews
from .tasks import TaskSpec


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
