"""Compare methods at equal steps, `finegates compare`: a plan's runs, one JSON line each.

A plan is JSON: ``{"common": {...}, "rows": [{...}, ...]}``. Every row, completed by ``common``, is
one or more runs: a list stands for each of its values (seeds, rates, sparsities). Keys are those of
`Run` and the fields of `GateConfig`. Finished runs are in the results file and aren't run again.
The runs themselves are in `experiment.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import report
from .experiment import Run, execute


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
    parser.add_argument("--data_dir", help="folder of GLUE tasks and of text files")
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
