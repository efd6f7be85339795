"""`finegates bench-model`: the pruned model against every runtime of the dense one."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import report
from ..export import dense_model
from ..report.bench_model import OURS, ModelBench, Result, bench_model
from ..report.bench_table import bench_markdown, bench_tables, plot_bench, reasons
from ..report.memory import Memory, memory_of
from ..report.runtimes import PEERS
from ..report.work import Work, is_decoder
from . import which_model
from .models import quiet_transformers
from .shapes import SHAPES

_ENCODER = [Work("prefill", *size) for size in ((1, 16), (1, 32), (1, 128), (8, 128))]
_DECODER = [Work("decode", 1, 128), Work("prefill", 1, 512)]
# Per shape the works and weight types whose bars docs/serving.md states.
BARS: dict[str, tuple[list[Work], list[str]]] = {
    "roberta-base": (_ENCODER, ["fp32", "bf16"]),
    "roberta-large": (_ENCODER, ["fp32", "bf16"]),
    "minilm": (_ENCODER[:3], ["fp32", "bf16"]),
    "smollm2": (_DECODER, ["bf16", "int8"]),
    "llama-1b": (_DECODER, ["bf16", "int8"]),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finegates bench-model", description=__doc__)
    which_model.add_arguments(parser)
    integers, words = which_model.numbers, which_model.words
    parser.add_argument("--batch", type=integers, default=[1, 8, 32])
    parser.add_argument("--sequence", type=integers, default=[16, 128, 512])
    parser.add_argument("--work", type=words, default=["prefill", "decode"])
    parser.add_argument("--dtype", type=words, default=["fp32", "bf16", "int8"])
    parser.add_argument(
        "--threads", type=integers, default=[1, which_model.numbers("all")[0]], help="1,all"
    )
    parser.add_argument(
        "--peers", type=words, help="default: all of " + ", ".join(peer.name for peer in PEERS)
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="time budget of a cell")
    parser.add_argument(
        "--bars",
        action="store_true",
        help="with --shape: the cells of docs/serving.md's bars instead of a grid",
    )
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--no-memory", action="store_true", help="start no serving processes")
    memory.add_argument("--only-memory", action="store_true", help="time nothing")
    parser.add_argument("--json", type=Path, help="write everything")
    parser.add_argument("--markdown", type=Path, help="write the tables")
    parser.add_argument("--png", type=Path, help="write a figure")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, time, print and write.

    Raises:
        ValueError: an argument is out of range, or our own result was wrong.
    """
    given = _parser().parse_args(arguments)
    if given.bars and given.shape is None:
        raise ValueError(f"--bars needs --shape, one of {', '.join(SHAPES)}")
    dtypes, peers = given.dtype, given.peers
    if given.bars:
        works, dtypes = BARS[given.shape]
        if given.sparsity == 0:  # held against transformers alone, which has no int8 weights
            dtypes, peers = [d for d in dtypes if d != "int8"], peers or ["transformers"]
    model, label = which_model.load(given, None if "fp32" in dtypes else "bf16")
    if not given.bars:
        works = _grid(model, given)
    threads = list(dict.fromkeys(given.threads))
    begin, console = time.monotonic(), Console(stderr=True)

    def progress(result: Result) -> None:
        cell, minutes = result.cell, (time.monotonic() - begin) / 60
        found = result.reason or f"{result.p50:.3g} ms"
        console.print(
            f"{minutes:5.1f} min  {cell.dtype} {cell.work.label} {cell.threads}T  "
            f"{result.runtime}: {found}",
            highlight=False,
        )

    results: list[Result] = []
    if not given.only_memory:
        results = bench_model(
            model,
            works,
            dtypes=dtypes,
            threads=threads,
            peers=peers,
            seconds=given.seconds,
            progress=progress,
        )
    total = report.parameters(dense_model(model))
    removed = (total - report.parameters(model)) / total
    memory = () if given.no_memory else _memory(model, works[0], "int8" in dtypes)
    sparsity = None if given.shape is None else given.sparsity
    bench = ModelBench(label, removed, results, memory, given.shape, sparsity)
    _write(bench, given)
    wrong = [r for r in results if r.runtime in OURS and r.reason]
    if wrong:
        raise ValueError(f"{wrong[0].runtime} {wrong[0].cell.work.label}: {wrong[0].reason}")


def _grid(model: Any, given: argparse.Namespace) -> list[Work]:
    kinds = [kind for kind in given.work if kind == "prefill" or is_decoder(model)]
    longest = getattr(model.config, "max_position_embeddings", None) or max(given.sequence)
    sequences = [s for s in given.sequence if s <= longest]
    return [Work(kind, b, s) for kind in kinds for b in given.batch for s in sequences]


def _memory(model: Any, work: Work, int8: bool) -> list[Memory]:
    """Save dense and pruned, and serve each in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="finegates-memory-") as folder:
        dense, pruned = Path(folder, "dense"), Path(folder, "pruned")
        with quiet_transformers():
            dense_model(model).save_pretrained(dense)
            model.save_pretrained(pruned)
        forms = [
            ("dense", dense, ()),
            ("pruned", pruned, ()),
            ("optimized", pruned, ("--optimize",)),
        ]
        if int8:
            forms.append(("optimized, int8", pruned, ("--optimize", "--int8")))
        return [memory_of(name, place, work, *options) for name, place, options in forms]


def _write(bench: ModelBench, given: argparse.Namespace) -> None:
    console = which_model.console()
    for table in bench_tables(bench):
        console.print(table)
    for line in reasons(bench):
        console.print(f"not timed: {line}", highlight=False)
    if given.json:
        given.json.write_text(json.dumps(bench.to_dict(), indent=1) + "\n", encoding="utf-8")
    if given.markdown:
        given.markdown.write_text(bench_markdown(bench), encoding="utf-8")
    if given.png:
        plot_bench(given.png, bench)


if __name__ == "__main__":
    main(sys.argv[1:])
