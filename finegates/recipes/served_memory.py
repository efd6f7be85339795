"""Load a saved model, serve a few requests, and print this process's memory as JSON.

``python -m finegates.recipes.served_memory FOLDER --work prefill 1 128 [--optimize] [--int8]``; the
caller is `finegates.report.memory.memory_of`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from ..report.memory import serve_and_measure
from ..report.work import Work
from ..serving import optimize_for_cpu
from .models import load_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--work", nargs=3, required=True)
    parser.add_argument("--optimize", action="store_true")
    parser.add_argument("--int8", action="store_true")
    given = parser.parse_args(arguments)
    kind, batch, length = given.work
    torch.set_num_threads(1)
    model = load_model(given.folder)
    if given.optimize:
        optimize_for_cpu(model, weight_dtype="int8" if given.int8 else None)
    work = Work(kind, int(batch), int(length))
    sys.stdout.write(json.dumps(serve_and_measure(model, work)) + "\n")


if __name__ == "__main__":
    main()
