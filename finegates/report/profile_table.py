"""`ModelProfile` as ``rich`` tables, as text and as a PNG."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ._files import replacing
from .bench_table import machine_text, markdown_table
from .profile import LayerProfile, ModelProfile
from .why import REASONS

_PARTS = ("linear", *REASONS)


def layer_lines(profile: ModelProfile) -> list[list[str]]:
    """Return header and a line per layer."""
    header = ["layer", "M", "rows kept", "columns kept", "weight kept", "ideal ×", "achieved ×"]
    lines = [[*header, "µs", "of peak", "of bandwidth", "why not faster"]]
    for layer in profile.layers:
        lines.append(
            [
                layer.name,
                str(layer.m),
                *_kept(layer),
                f"{100 * layer.kept:.0f} %",
                f"{1 / layer.kept:.2f}" if layer.kept else "∞",
                f"{layer.achieved:.2f}",
                "≈ " * layer.estimated + f"{1e6 * layer.seconds:.1f}",
                f"{100 * layer.share('compute'):.0f} %",
                f"{100 * layer.share('bandwidth'):.0f} %",
                layer.reason,
            ]
        )
    return lines


def _kept(layer: LayerProfile) -> tuple[str, str]:
    if len(layer.shapes) > 1:
        return f"{len(layer.shapes)} Linears", ""
    rows, columns, n, k = layer.shapes[0]
    return f"{n}/{rows}", f"{k}/{columns}"


def part_lines(profile: ModelProfile) -> list[list[str]]:
    """Return header and a line per part of the model, and the sum."""
    lines = [["part", "dense ms", "ms", "share", "×"]]
    for part in _PARTS:
        dense, ours = profile.dense_parts.get(part, 0.0), profile.parts.get(part, 0.0)
        if dense or ours:
            lines.append(_part(part, dense, ours, profile.seconds))
    lines.append(_part("whole model", profile.dense_seconds, profile.seconds, profile.seconds))
    return lines


def _part(name: str, dense: float, ours: float, whole: float) -> list[str]:
    ratio = f"{dense / ours:.2f}" if ours else ""
    return [name, f"{1e3 * dense:.3g}", f"{1e3 * ours:.3g}", f"{100 * ours / whole:.0f} %", ratio]


def loss_text(profile: ModelProfile) -> str:
    """Return in one line what costs most beyond the ideal, largest first."""
    lost = [
        f"{reason} {1e3 * seconds:.3g} ms ({100 * seconds / profile.seconds:.0f} %)"
        for reason, seconds in profile.losses().items()
        if seconds >= 0.005 * profile.seconds
    ]
    return "largest losses: " + (", ".join(lost) or "none")


def profile_tables(profile: ModelProfile) -> list[Any]:
    """Return the tables for a terminal: layers, and parts."""
    from rich import box
    from rich.table import Table

    drawn = []
    title = f"{profile.model}, {profile.work.label}, {profile.dtype}, {profile.threads} threads"
    for lines, name in ((layer_lines(profile), title), (part_lines(profile), "the whole call")):
        table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD)
        for i, column in enumerate(lines[0]):
            text = i == 0 or column == "why not faster"
            table.add_column(column, justify="left" if text else "right")
        for line in lines[1:]:
            table.add_row(*line)
        drawn.append(table)
    return drawn


def profile_markdown(profile: ModelProfile) -> str:
    """Return what was measured where, the losses, the parts and the layers as Markdown."""
    ratio = f"{profile.dense_seconds / profile.seconds:.2f}"
    return (
        f"**{profile.model}**, {profile.work.label}, {profile.dtype}, {profile.threads} of "
        f"{machine_text(profile.machine)}: {ratio} times the dense twin's speed; "
        f"{loss_text(profile)}\n\n"
        f"{markdown_table(part_lines(profile))}\n{markdown_table(layer_lines(profile))}"
    )


def plot_profile(path: str | os.PathLike[str], profile: ModelProfile) -> None:
    """Draw both models' time by part, and each layer's achieved and ideal speed-up, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=(1, 2.2))
    _draw_parts(above, profile)
    _draw_layers(below, profile.layers)
    figure.suptitle(
        f"{profile.model}, {profile.work.label}, {profile.dtype}, {profile.threads} threads: "
        f"{profile.dense_seconds / profile.seconds:.2f}×",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_parts(axis: Any, profile: ModelProfile) -> None:
    left = [0.0, 0.0]
    for i, part in enumerate(_PARTS):
        widths = [1e3 * p.get(part, 0.0) for p in (profile.parts, profile.dense_parts)]
        axis.barh(["this model", "dense"], widths, left=left, color=f"C{i}", label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_xlabel("milliseconds a call", fontsize=8)
    axis.legend(fontsize=7, ncols=len(_PARTS), frameon=False, loc="lower right")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_layers(axis: Any, layers: Sequence[LayerProfile]) -> None:
    reasons = list(dict.fromkeys(layer.reason for layer in layers))
    for i, reason in enumerate(reasons):
        chosen = [(x, layer) for x, layer in enumerate(layers) if layer.reason == reason]
        heights = [layer.achieved for _, layer in chosen]
        axis.bar([x for x, _ in chosen], heights, color=f"C{i}", label=reason)
    ideal = [1 / layer.kept if layer.kept else float("nan") for layer in layers]
    axis.plot(range(len(layers)), ideal, "_", color="black", label="ideal")
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_ylabel("times faster than dense, in place", fontsize=8)
    axis.set_xlabel("layer, in the model's order", fontsize=8)
    axis.legend(fontsize=7, frameon=False, ncols=len(reasons) + 1)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
