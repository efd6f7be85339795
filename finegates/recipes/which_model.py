"""The model of a command: a folder, a hub id, or a shape with random weights."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console

from ..report.bench_model import DTYPES
from .models import load_model
from .shapes import SHAPES, shaped_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, --shape and --sparsity."""
    parser.add_argument("model", nargs="?", help="folder or hub id, pruned or dense")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="random weights in this shape")
    parser.add_argument(
        "--sparsity",
        type=float,
        default=0.4,
        help="with --shape: fraction of the gated weights removed at random (default 0.4)",
    )


def load(given: argparse.Namespace, dtype: str | None = None) -> tuple[Any, str]:
    """Return the model and what it is, in words.

    Raises:
        ValueError: neither or both of MODEL and --shape were given, or a value is out of range.
        OSError: the model can't be found.
    """
    if (given.model is None) == (given.shape is None):
        raise ValueError("give either MODEL or --shape")
    wanted = None if dtype is None else DTYPES[dtype]
    if given.model is not None:
        return load_model(given.model, wanted), str(given.model)
    model = shaped_model(given.shape, given.sparsity, wanted or torch.float32)
    return model, f"{given.shape} shape, {100 * given.sparsity:g} % of gated weights removed"


def console() -> Console:
    """Return standard output, wide enough for a table where it is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=200)


def numbers(text: str) -> list[int]:
    """Parse whole numbers separated by commas; ``all`` is torch's number of threads."""
    return [torch.get_num_threads() if part == "all" else int(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    """Parse words separated by commas."""
    return text.split(",")
