"""`ModelBench` as a ``rich`` table, as Markdown and as a PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ._files import replacing
from .bench_model import OURS, ModelBench, Result


def bench_lines(bench: ModelBench) -> list[list[str]]:
    """Return header and lines: milliseconds (p50) per cell and runtime, our lead, and more of ours.

    The lead is the time of the fastest dense runtime over the optimised model's.
    """
    runtimes = list(dict.fromkeys(r.runtime for r in bench.results if r.p50 is not None))
    more = ["× fastest dense", "tokens/s", "of bandwidth"]
    lines = [["weights", "work", "threads", *runtimes, *more]]
    for cell, results in bench.cells().items():
        times = [milliseconds(results.get(name)) for name in runtimes]
        ours = results.get(OURS[-1])
        rate = ours.tokens_per_second if ours else None
        share = ours.share_of_bandwidth if ours else None
        ratio = lead(results.values())
        lines.append(
            [
                cell.dtype,
                cell.work.label,
                str(cell.threads),
                *times,
                "" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]})",
                "" if rate is None else f"{rate:.0f}",
                "" if share is None else f"{100 * share:.0f} %",
            ]
        )
    return lines


def lead(results: Any) -> tuple[float, str] | None:
    """Return the fastest dense runtime's p50 over the optimised model's, and its name."""
    timed = {r.runtime: r.p50 for r in results if r.p50 is not None}
    dense = {name: p50 for name, p50 in timed.items() if name not in OURS}
    if not dense or OURS[-1] not in timed:
        return None
    fastest = min(dense, key=lambda name: dense[name])
    return dense[fastest] / timed[OURS[-1]], fastest


def milliseconds(result: Result | None) -> str:
    """Return p50 as text, or a dash."""
    if result is None or result.p50 is None:
        return "–"
    return f"{result.p50:.3g}" if result.p50 < 1000 else f"{result.p50:.0f}"


def reasons(bench: ModelBench) -> list[str]:
    """Return what wasn't timed and why: a runtime, its weight types, the reason."""
    absent: dict[tuple[str, str], dict[str, None]] = {}
    for r in bench.results:
        if r.reason:
            absent.setdefault((r.runtime, r.reason), {})[r.cell.dtype] = None
    return [f"{name} {' '.join(dtypes)}: {why}" for (name, why), dtypes in absent.items()]


def memory_lines(bench: ModelBench) -> list[list[str]]:
    """Return header and lines of the serving processes' memory in MB."""
    lines = [["model", "weights", "resident", "peak, loading included"]]
    for memory in bench.memory:
        sizes = (memory.weights, memory.resident, memory.peak)
        lines.append([memory.model, *(f"{size / 1e6:.0f} MB" for size in sizes)])
    return lines


def bench_tables(bench: ModelBench) -> list[Any]:
    """Return the tables for a terminal: times and memory, each where it was measured."""
    tables = [_rich(bench_lines(bench), bench.model)] if bench.results else []
    if bench.memory:
        tables.append(_rich(memory_lines(bench), "memory of the serving process"))
    return tables


def bench_markdown(bench: ModelBench) -> str:
    """Return times, what is missing and why, and memory as Markdown."""
    text = f"**{bench.model}**: {100 * bench.removed:.1f} % of its parameters removed; milliseconds"
    text += f" (p50), {machine_text(bench.machine)}\n\n{markdown_table(bench_lines(bench))}"
    if absent := reasons(bench):
        text += "\nNot timed: " + "; ".join(absent) + ".\n"
    if bench.memory:
        text += "\n" + markdown_table(memory_lines(bench))
    return text


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return header and lines as Markdown."""
    rule = ["---"] * len(lines[0])
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], rule, *lines[1:]))


def machine_text(machine: Mapping[str, Any]) -> str:
    """Return `timing.machine`'s facts that decide about times, in one line."""
    return (
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, commit {machine['commit']}"
    )


def plot_bench(path: str | os.PathLike[str], bench: ModelBench) -> None:
    """Draw p50 of every runtime as bars, a group for each cell, as a PNG.

    Raises:
        ValueError: nothing was timed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [r for r in bench.results if r.p50 is not None]
    if not timed:
        raise ValueError("bench must have a timed result")
    cells = list(dict.fromkeys(r.cell for r in timed))
    runtimes = list(dict.fromkeys(r.runtime for r in timed))
    figure = Figure(figsize=(max(6.0, 1.1 * len(cells) + 2), 4.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    wide = 0.8 / len(runtimes)
    for i, name in enumerate(runtimes):
        results = [r for r in timed if r.runtime == name]
        places = [cells.index(r.cell) + wide * (i - (len(runtimes) - 1) / 2) for r in results]
        color = {"pruned": "#7fb069", "optimized": "#1b7837"}.get(name, f"C{i}")
        axis.bar(places, [r.p50 or 0.0 for r in results], wide, label=name, color=color)
    labels = [f"{c.work.label}\n{c.dtype}, {c.threads}T" for c in cells]
    axis.set_xticks(range(len(cells)), labels, fontsize=7)
    axis.set_yscale("log")
    axis.set_ylabel("milliseconds, p50")
    axis.set_title(f"{bench.model}: {100 * bench.removed:.0f} % removed", fontsize=10, loc="left")
    axis.legend(fontsize=7, ncols=3, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _rich(lines: Sequence[Sequence[str]], title: str) -> Any:
    from rich import box
    from rich.table import Table

    drawn = Table(*lines[0], title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for line in lines[1:]:
        drawn.add_row(*line)
    return drawn
