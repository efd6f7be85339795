"""`finegates profile`: where a pruned model's time goes, and why it isn't faster."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..report.bench_model import DTYPES
from ..report.profile import profile_model
from ..report.profile_table import loss_text, plot_profile, profile_markdown, profile_tables
from ..report.work import Work
from ..serving import optimize_for_cpu
from . import which_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write.

    Raises:
        ValueError, OSError: an argument is out of range, or the model can't be loaded.
    """
    parser = argparse.ArgumentParser(prog="finegates profile", description=__doc__)
    which_model.add_arguments(parser)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--work", choices=("prefill", "decode"), default="prefill")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: as stored, fp32 shapes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--optimize", action="store_true", help="after optimize_for_cpu")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each of two measurements")
    parser.add_argument("--json", type=Path, help="write everything")
    parser.add_argument("--markdown", type=Path, help="write the tables")
    parser.add_argument("--png", type=Path, help="write a figure")
    given = parser.parse_args(arguments)
    if given.threads < 1:
        raise ValueError(f"threads must be at least 1, got {given.threads}")
    work = Work(given.work, given.batch, given.sequence)
    model, label = which_model.load(given, given.dtype)
    if given.optimize or given.dtype == "int8":
        optimize_for_cpu(model, weight_dtype="int8" if given.dtype == "int8" else None)
    profile = profile_model(model, work, name=label, threads=given.threads, seconds=given.seconds)
    console = which_model.console()
    for table in profile_tables(profile):
        console.print(table)
    console.print(loss_text(profile), highlight=False)
    if given.json:
        given.json.write_text(json.dumps(profile.to_dict(), indent=1) + "\n", encoding="utf-8")
    if given.markdown:
        given.markdown.write_text(profile_markdown(profile), encoding="utf-8")
    if given.png:
        plot_profile(given.png, profile)


if __name__ == "__main__":
    main(sys.argv[1:])
