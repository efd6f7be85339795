"""A run's rows as one table, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ._files import replacing
from .counts import Kept
from .timing import Timing, machine

REPORT_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One model of the main job's table.

    Args:
        model: its name, the key under which `latency` timed it.
        score: the report's metric; a fraction, unless it is a perplexity or a loss.
        trainable: parameters that were trained, gates included.
        requested, removed: fraction of the gated weights; None where nothing is to be removed.
        removed_of_model: fraction of the whole model's parameters.
        disk: bytes of the saved folder.
        step: seconds of a training step at the end of training.
        requested_latency, removed_latency: fraction of the gated layers' seconds, as the run's
            table of costs has them; only where the budget counts latency.
    """

    model: str
    score: float
    trainable: int | None = None
    requested: float | None = None
    removed: float | None = None
    removed_of_model: float | None = None
    disk: int | None = None
    step: float | None = None
    requested_latency: float | None = None
    removed_latency: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything `write_report` writes.

    Args:
        job: the task, the model and the settings, JSON values only.
        metric: the name of the rows' score.
        rows, timings, layers: see their classes.
        splits: the reloaded model's score on further labelled splits.
        ratios: the gated run's figures over those of the run without gates.
        samples: per model a text that it wrote.
        history: per stage what its Trainer logged; drawn, not written again.
    """

    job: Mapping[str, Any]
    metric: str
    rows: Sequence[Row]
    timings: Sequence[Timing] = ()
    layers: Sequence[Kept] = ()
    machine: Mapping[str, Any] = field(default_factory=machine)
    splits: Mapping[str, float] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)
    samples: Mapping[str, str] = field(default_factory=dict)
    history: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the schema's version; what isn't finite becomes null."""
        return {
            "version": REPORT_VERSION,
            "job": dict(self.job),
            "machine": dict(self.machine),
            "metric": self.metric,
            "rows": [{**asdict(row), "score": _or_none(row.score)} for row in self.rows],
            "timings": [asdict(timing) for timing in self.timings],
            "layers": [layer.to_dict() for layer in self.layers],
            "splits": {split: _or_none(score) for split, score in self.splits.items()},
            "ratios": dict(self.ratios),
            "samples": dict(self.samples),
        }


def _or_none(score: float) -> float | None:
    return score if math.isfinite(score) else None


def form(metric: str) -> Callable[[float], str]:
    """Return how a score of this metric is written."""
    return {"perplexity": _digits, "loss": "{:.3f}".format}.get(metric, _percent)


def table(report: Report) -> Any:
    """Return the report as a ``rich`` table, a column per model; five models fit 80 columns."""
    from rich import box
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    drawn.add_column(no_wrap=True)
    for row in report.rows:
        drawn.add_column(row.model, justify="right", vertical="bottom")
    for line in _lines(report):
        drawn.add_row(*line)
    return drawn


def markdown(report: Report) -> str:
    """Return the report as a Markdown table, a column per model."""
    header = ["", *(row.model for row in report.rows)]
    rule = ["---", *["---:"] * len(report.rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *_lines(report)))


def lines(report: Report) -> list[str]:
    """Return what stands below the table: further splits, ratios and samples, a line each."""
    write = form(report.metric)
    return [
        *(f"{split}: {report.metric} {write(v)} (reloaded)" for split, v in report.splits.items()),
        *(f"{name}, gated / dense: {ratio:.3f}" for name, ratio in report.ratios.items()),
        *(f"{model}: {' '.join(text.split())}" for model, text in report.samples.items()),
    ]


def _lines(report: Report) -> list[list[str]]:
    """Return the table's lines, each a title and a cell per model; lines without values drop."""

    def line(title: str, value: Callable[[Row], float | None], write: Any) -> list[str]:
        values = [value(row) for row in report.rows]
        return [title, *("" if v is None else write(v) for v in values)]

    lines = [
        line(report.metric, lambda row: row.score, form(report.metric)),
        line("gated weights, requested", lambda row: row.requested, _percent),
        line("gated weights, removed", lambda row: row.removed, _percent),
        line("their latency, requested", lambda row: row.requested_latency, _percent),
        line("their latency, removed", lambda row: row.removed_latency, _percent),
        line("whole model, removed", lambda row: row.removed_of_model, _percent),
        line(
            "trained parameters", lambda row: row.trainable, lambda v: _unit(v, ("", "k", "M", "G"))
        ),
        line("training step", lambda row: row.step, lambda v: f"{_digits(1e3 * v)} ms"),
        line("size on disk", lambda row: row.disk, lambda v: _unit(v, ("B", "kB", "MB", "GB"))),
    ]
    timed = {(t.model, t.inputs, t.threads): t for t in report.timings}
    for inputs, threads in dict.fromkeys((t.inputs, t.threads) for t in report.timings):
        found = {row.model: timed.get((row.model, inputs, threads)) for row in report.rows}
        cells = [
            ("", "") if t is None else (f"{_digits(t.median)} ms", f"{t.speedup:.2f}×")
            for t in found.values()
        ]
        title = f"{inputs}, {threads} thread{'s' if threads > 1 else ''}"
        lines.append([title, *(cell[0] for cell in cells)])
        lines.append(["  speed-up", *(cell[1] for cell in cells)])
    return [cells for cells in lines if any(cells[1:])]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _digits(value: float) -> str:
    """Return a positive number with three significant digits, never fewer before the point."""
    exponent = math.floor(math.log10(float(f"{value:.2e}"))) if value > 0 else 0
    return f"{value:.{max(0, 2 - exponent)}f}"


def _unit(value: float, units: Sequence[str]) -> str:
    """Return the value in the fitting power of 1000."""
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    number = _digits(value) if power else f"{value:.0f}"
    return f"{number} {units[power]}".strip()


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write the report as JSON; an interrupted write leaves the old file.

    Raises:
        ValueError: a value is not finite or no JSON.
    """
    try:
        text = json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"report: {error}") from None
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
