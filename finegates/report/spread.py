"""Scores of repeated runs: mean and spread over seeds, at each setting's best learning rate."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._files import replacing

Line = Mapping[str, Any]
# Scores that are better when lower, shown as they are; all others are shown in percent.
_LOWER = ("perplexity",)


@dataclass(frozen=True)
class Spread:
    """The runs of one setting at one learning rate.

    Args:
        rate: the learning rate.
        removed: mean removed fraction of the gated weights.
        scores: one per seed, in percent, or as they are where lower is better.
    """

    rate: float
    removed: float
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean score over the seeds."""
        return statistics.mean(self.scores)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the seeds, 0 for one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


def spread_table(lines: Sequence[Line]) -> str:
    """Return a Markdown table of results, one row per setting.

    A row shows the learning rate with the best mean score, the mean ± standard deviation over its
    seeds and their number; beside it the other rates that were tried.

    Args:
        lines: of ``finegates compare``: each has ``run`` (a flat dict), ``scores`` (the deciding
            one first) and ``removed``.
    """
    rows = ["| setting | removed | score | rate | other rates |", "|---|---|---|---|---|"]
    for (label, _), (best, *others) in _settings(lines).items():
        tried = "; ".join(f"{other.rate:g}: {_text(other)}" for other in others)
        cells = (label, f"{100 * best.removed:.1f} %", _text(best), f"{best.rate:g}", tried)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def plot_spread(path: str | os.PathLike[str], lines: Sequence[Line], title: str = "") -> None:
    """Draw mean scores against the removed fraction as a PNG, with standard deviations.

    Settings that differ in ``sparsity`` alone form a curve; those that remove nothing are dashed
    lines across.

    Raises:
        ValueError: there is no line.
    """
    if not lines:
        raise ValueError("lines must not be empty")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list[Spread]] = {}
    for (label, _), (best, *_others) in _settings(lines).items():
        curves.setdefault(label, []).append(best)
    figure = Figure(figsize=(7.0, 4.2), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, (label, points) in enumerate(curves.items()):
        points.sort(key=lambda point: point.removed)
        color = f"C{number}"
        if points[-1].removed == 0.0:
            axis.axhline(points[0].mean, linestyle="--", color=color, label=label)
            continue
        axis.errorbar(
            [100 * point.removed for point in points],
            [point.mean for point in points],
            [point.deviation for point in points],
            marker="o", markersize=4, capsize=3, color=color, label=label,
        )  # fmt: skip
    axis.set_xlabel("gated weights removed, %", fontsize=9)
    metric = _metric(lines[0])
    axis.set_ylabel(metric if metric in _LOWER else f"{metric}, %", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    if title:
        axis.set_title(title, fontsize=10, loc="left")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _settings(lines: Sequence[Line]) -> dict[tuple[str, float | None], list[Spread]]:
    """Return per setting (what it differs in from the others; sparsity) its rates, best first."""
    runs = [line["run"] for line in lines]
    keys = dict.fromkeys(key for run in runs for key in run)
    shared = {key for key in keys if len({repr(run.get(key)) for run in runs}) == 1}
    hidden = shared | {"method", "seed", "learning_rate", "sparsity"}
    found: dict[tuple[str, float | None], dict[float, list[Line]]] = {}
    for line in lines:
        run = line["run"]
        label = ", ".join(
            [run["method"], *(f"{key} {run[key]}" for key in run if key not in hidden)]
        )
        rates = found.setdefault((label, run.get("sparsity")), {})
        rates.setdefault(run["learning_rate"], []).append(line)
    higher = _metric(lines[0]) not in _LOWER if lines else True
    return {
        setting: sorted(
            (_spread(rate, same) for rate, same in rates.items()),
            key=lambda spread: spread.mean,
            reverse=higher,
        )
        for setting, rates in found.items()
    }


def _metric(line: Line) -> str:
    name: str = next(iter(line["scores"]))
    return name


def _spread(rate: float, lines: Sequence[Line]) -> Spread:
    removed = statistics.mean(line["removed"] for line in lines)
    metric = _metric(lines[0])
    scale = 1.0 if metric in _LOWER else 100.0
    return Spread(rate, removed, tuple(scale * line["scores"][metric] for line in lines))


def _text(spread: Spread) -> str:
    deviation = f" ± {spread.deviation:.2f}" if len(spread.scores) > 1 else ""
    return f"{spread.mean:.2f}{deviation} ({len(spread.scores)})"
