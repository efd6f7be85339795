"""The figure of a run's training: losses, score against removal, gates over time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ._files import replacing
from .counts import GATE_BINS
from .summary import Report

_Panel = Callable[[Any, Report], None]
_Entry = Mapping[str, Any]


def plot_training(path: str | os.PathLike[str], report: Report, title: str = "") -> None:
    """Draw what the Trainers logged, and what the report's models score, as a PNG.

    Panels: training loss per stage over the steps (evaluations dashed), score against the removed
    fraction of the gated weights, and how far the gates are from their closing edge over the steps.
    A panel without data is left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[_Panel] = [_removal]
    if any(_series(entries, "loss") for entries in report.history.values()):
        panels.insert(0, _losses)
    if any("gates" in entry for entries in report.history.values() for entry in entries):
        panels.append(_gates)
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    for axis, panel in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True
    ):
        panel(axis, report)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _series(entries: Sequence[_Entry], key: str, over: str = "step") -> list[tuple[float, float]]:
    return [(entry[over], entry[key]) for entry in entries if key in entry and over in entry]


def _losses(axis: Any, report: Report) -> None:
    for number, (stage, entries) in enumerate(report.history.items()):
        for key, style, label in (("loss", "-", stage), ("eval_loss", "--", None)):
            points = _series(entries, key)
            if points:
                axis.plot(*zip(*points, strict=True), style, color=f"C{number}", label=label)
    axis.set_title("loss, evaluation dashed", fontsize=10, loc="left")
    axis.set_xlabel("step", fontsize=8)
    axis.legend(fontsize=8, frameon=False)


def _removal(axis: Any, report: Report) -> None:
    scored: list[_Entry] = [
        {**entry, "score": _score(entry, report.metric)}
        for entry in report.history.get("gated", ())
        if _score(entry, report.metric) is not None
    ]
    points = _series(scored, "score", over="removed")
    if points:
        axis.plot(*zip(*points, strict=True), ".-", color="C0", label="during training")
    for number, row in enumerate(report.rows):
        if row.model != "reloaded":
            axis.plot(row.removed or 0.0, row.score, "o", color=f"C{number + 1}", label=row.model)
    axis.set_title(f"{report.metric} by gated weights removed", fontsize=10, loc="left")
    axis.set_xlabel("removed fraction", fontsize=8)
    axis.legend(fontsize=8, frameon=False)


def _score(entry: _Entry, metric: str) -> float | None:
    if metric == "perplexity":
        loss = entry.get("eval_loss")
        return None if loss is None else math.exp(loss)
    return entry.get(f"eval_{metric}")


def _gates(axis: Any, report: Report) -> None:
    entries = [e for log in report.history.values() for e in log if "gates" in e]
    shares = [[count / max(entry["gates"]) for count in entry["gates"]] for entry in entries]
    columns = [[share[i] for share in shares] for i in range(GATE_BINS)]
    first, last = entries[0]["step"], entries[-1]["step"]
    axis.imshow(
        columns, origin="lower", aspect="auto", cmap="YlGnBu", vmin=0.0,
        extent=(first, max(last, first + 1), -1.0, 1.0),
    )  # fmt: skip
    axis.axhline(0.0, color="#222222", linewidth=0.8)
    axis.set_yticks([-0.5, 0.0, 0.5], ["closed", "edge", "open"])
    axis.set_title("gates by distance to their edge", fontsize=10, loc="left")
    axis.set_xlabel("step", fontsize=8)
