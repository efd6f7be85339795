"""The figure of what each layer keeps."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from ._files import replacing
from .counts import Kept

_INDEXED = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")
_KINDS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention output",
    "intermediate.dense": "MLP in",
    "output.dense": "MLP out",
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "attention output",
    "mlp.gate_proj": "MLP gate",
    "mlp.up_proj": "MLP up",
    "mlp.down_proj": "MLP down",
}


def _place(name: str) -> tuple[str, int]:
    """Return a module's kind and depth."""
    found = _INDEXED.match(name)
    depth, kind = (int(found[1]), found[2]) if found else (0, name)
    return _KINDS.get(kind, kind), depth


def plot_kept(path: str | os.PathLike[str], layers: Sequence[Kept], title: str = "") -> None:
    """Draw the kept rows, columns and weights of every layer as a PNG, by kind and depth.

    Raises:
        ValueError: there is no layer.
    """
    if not layers:
        raise ValueError("layers must not be empty")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = [_place(layer.name) for layer in layers]
    kinds = list(dict.fromkeys(kind for kind, _ in places))
    depths = sorted({depth for _, depth in places})
    panels: tuple[tuple[str, Callable[[Kept], float]], ...] = (
        ("rows kept, %", lambda layer: layer.kept_rows / layer.rows),
        ("columns kept, %", lambda layer: layer.kept_columns / layer.columns),
        ("weights kept, %", lambda layer: layer.fraction),
    )
    wide, tall = (1, 3) if len(depths) > 12 else (3, 1)
    size = (
        wide * (0.44 * max(len(depths), 4) + 0.3) + 2.3,
        tall * (0.34 * len(kinds) + 0.7) + 0.8,
    )
    figure = Figure(figsize=size, layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(tall, wide, sharex=True, sharey=True).flat)
    for axis, (name, value) in zip(axes, panels, strict=True):
        grid = [[math.nan] * len(depths) for _ in kinds]
        for layer, (kind, depth) in zip(layers, places, strict=True):
            grid[kinds.index(kind)][depths.index(depth)] = value(layer)
        image = _strip(axis, grid, kinds, depths, name)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0", "50", "100"], fontsize=8)
    bar.outline.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _strip(axis: Any, grid: Any, kinds: Sequence[str], depths: Sequence[int], name: str) -> Any:
    """Draw one panel: a cell per layer with its percentage."""
    image = axis.imshow(grid, cmap="YlGnBu", vmin=0.0, vmax=1.0, aspect="auto")
    axis.set_title(name, fontsize=10, loc="left")
    axis.set_xticks(range(len(depths)), [str(depth) for depth in depths], fontsize=8)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=9)
    axis.set_xlabel("layer", fontsize=8)
    axis.label_outer()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xticks([i - 0.5 for i in range(1, len(depths))], minor=True)
    axis.set_yticks([i - 0.5 for i in range(1, len(kinds))], minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="minor", length=0)
    for y, line in enumerate(grid):
        for x, kept_fraction in enumerate(line):
            if not math.isnan(kept_fraction):
                color = "white" if kept_fraction > 0.55 else "#222222"
                text = f"{100 * kept_fraction:.0f}"
                axis.text(x, y, text, ha="center", va="center", fontsize=8, color=color)
    return image
