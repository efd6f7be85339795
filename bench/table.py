"""Turn pytest-benchmark JSON into the README's tables and a PNG.

python bench/table.py one-thread.json [--png one-thread.png] > one-thread.md
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from shapes import BATCHES, REMOVED

IDEAL = 1 / (1 - REMOVED)
Row = dict[str, Any]


class Bar(NamedTuple):
    """What a number of every row of a group is held against."""

    group: str
    key: str
    bound: float
    what: str
    applies: Callable[[Row], bool] = lambda row: True
    least: bool = True  # else the most that is allowed


BARS = (
    Bar("grid", "dense_ratio", 3.0, "times dense F.linear", lambda row: row["m"] == 1),
    Bar("grid", "dense_ratio", 2.5, "times dense F.linear", lambda row: 1 < row["m"] <= 8),
    Bar("grid", "dense_ratio", IDEAL, "times dense F.linear", lambda row: row["m"] > 8),
    Bar("grid", "library_ratio", 1.0, "times the best library GEMM"),
    Bar("grid", "share_of_peak", 0.88, "of the arithmetic peak", lambda row: row["m"] >= 64),
    Bar("grid", "share_of_read_bandwidth", 0.85, "of bandwidth", lambda row: row["m"] == 1),
    Bar("cold", "share_of_read_bandwidth", 0.85, "of bandwidth", lambda row: row["m"] == 1),
    Bar("cold", "dense_ratio", 1.0, "times dense F.linear"),
    Bar("compiled", "compiled_ratio", 1.0, "times torch.compile, gathered shape"),
    # More than all of it: a part of the weights was in the cache, so this is no share.
    Bar("cold", "share_of_read_bandwidth", 1.0, "of bandwidth", least=False),
    Bar("int8", "share_of_read_bandwidth", 1.0, "of bandwidth", least=False),
    Bar("removed", "dense_ratio", 1.0, "times dense F.linear"),
    Bar("int8", "ratio", 1.6, "times our bf16", lambda row: row["m"] == 1),
    Bar("overhead", "overhead_ratio", 1.3, "of F.linear's call", least=False),
    Bar("overhead", "packed_linear_ratio", 1.3, "of F.linear's call, packed_linear", least=False),
    Bar("overhead", "module_ratio", 1.3, "of nn.Linear's call, PrunedLinear", least=False),
    Bar("pack", "memory_over_weight", 1.05, "of the weight's memory", least=False),
)
CELL = {
    "group": "{}:",
    "layer": "{}",
    "dtype": "{}",
    "m": "M={}",
    "threads": "T={}",
    "removed": "{:.0%} removed",
}
ABOUT = ("cpu_name", "isa", "torch", "clock", "commit")
MEANS = (("dense_ratio", 2.2), ("library_ratio", 1.15))


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    data = json.loads(path.read_text())
    rows = [{"group": b["group"], **b["extra_info"]} for b in data["benchmarks"]]
    return data["machine_info"], rows


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def grid(rows: list[Row], key: str, title: str, form: str = "{:.2f}") -> str:
    """One line for each layer and dtype, one column for each M."""
    cells = {(r["layer"], r["dtype"], r["m"], r["threads"]): r[key] for r in rows}
    batches = [m for m in BATCHES if any(c[2] == m for c in cells)]
    lines = [f"**{title}**", "", "| layer | dtype | threads | " + " | ".join(map(str, batches))]
    lines[-1] += " |"
    lines.append("|---|---|---|" + "---|" * len(batches))
    for layer, dtype, threads in dict.fromkeys((c[0], c[1], c[3]) for c in cells):
        values = [cells.get((layer, dtype, m, threads)) for m in batches]
        text = ["" if v is None else form.format(v) for v in values]
        lines.append(f"| {layer} | {dtype} | {threads} | " + " | ".join(text) + " |")
    values = list(cells.values())
    lines += [
        "",
        f"least {form.format(min(values))}, geometric mean {form.format(geomean(values))}",
    ]
    return "\n".join(lines)


def simple(rows: list[Row], columns: list[str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in rows:
        cells = [r.get(c, "") for c in columns]
        text = [f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells]
        lines.append("| " + " | ".join(text) + " |")
    return "\n".join(lines)


def fault(value: float, bound: float, what: str, least: bool = True) -> str:
    """Tell a miss, rounded away from the bar so that it never reads as met; "" if there is none."""
    if value >= bound if least else value <= bound:
        return ""
    shown = (math.floor if least else math.ceil)(1000 * value) / 1000
    return f"{shown:.3f} {what}, {'not' if least else 'more than'} {bound:.3f}"


def missed(rows: list[Row]) -> str:
    """What falls short of the bars, cell by cell, and the grid's geometric means."""
    out = []
    for r in rows:
        bars = [b for b in BARS if b.group == r["group"] and b.key in r and b.applies(r)]
        faults = [fault(r[b.key], b.bound, b.what, b.least) for b in bars]
        if any(faults):
            cell = " ".join(form.format(r[key]) for key, form in CELL.items() if key in r)
            out.append(f"* {cell}: {'; '.join(filter(None, faults))}")
    for threads in sorted({r["threads"] for r in rows if r["group"] == "grid"}):
        cells = [r for r in rows if r["group"] == "grid" and r["threads"] == threads]
        for key, bound in MEANS:
            if text := fault(geomean([r[key] for r in cells]), bound, key):
                out.append(f"* geometric mean T={threads}: {text}")
    return "\n".join(out) or "none"


def absences(rows: list[Row]) -> str:
    """Which libraries were not timed and why, each reason once with its number of cells."""
    reasons = Counter(pair for r in rows for pair in r.get("absent", {}).items())
    return "\n".join(f"* {name} ({n} cells): {why}" for (name, why), n in reasons.items()) or "none"


def named_by_share(rows: list[Row]) -> list[Row]:
    return [{**r, "layer": f"{r['layer']}, {r['removed']:.0%} removed"} for r in rows]


def report(machine: dict[str, Any], rows: list[Row]) -> str:
    by_group = {g: [r for r in rows if r["group"] == g] for g in {r["group"] for r in rows}}
    about = [machine.get(key, "unknown") for key in ABOUT]
    parts = ["{}, {}, torch {}, {} time, commit {}, {:.0%} removed".format(*about, REMOVED)]
    parts.append(f"**short of a bar**\n\n{missed(rows)}")
    if cells := by_group.get("grid"):
        parts += [
            grid(cells, "dense_ratio", "times faster than dense F.linear, by M"),
            grid(cells, "fastest_dense_ratio", "times faster than the fastest dense runtime"),
            grid(cells, "library_ratio", "times faster than the best library GEMM, gathered shape"),
            f"**not timed**\n\n{absences(rows)}",
        ]
        if with_peak := [r for r in cells if "share_of_peak" in r]:
            title = "share of the arithmetic peak"
            parts.insert(-1, grid(with_peak, "share_of_peak", title, "{:.0%}"))
    if cells := by_group.get("compiled"):
        columns = ["layer", "dtype", "m", "threads", "compiled_ratio", "compiled_dense_ratio"]
        title = "**over torch.compile with freezing: gathered shape, dense layer**"
        parts.append(f"{title}\n\n{simple(cells, [*columns, 'library', 'library_ratio'])}")
    if cells := by_group.get("removed"):
        title = "times faster than dense F.linear, by share removed"
        parts.append(grid(named_by_share(cells), "dense_ratio", title))
    if cells := by_group.get("cold"):
        columns = ["layer", "dtype", "threads", "removed", "weight_gbytes_per_second"]
        columns += ["share_of_read_bandwidth", "cycle_megabytes"]
        cache = machine.get("last_level_cache", 0) >> 20
        parts += [
            grid(named_by_share(cells), "dense_ratio", "times faster than dense, cold weights"),
            f"**cold weights at M = 1, last-level cache {cache or '?'} MB**\n\n"
            + simple([r for r in cells if r["m"] == 1], columns),
        ]
    decode = ["layer", "dtype", "m", "threads", "ratio"]
    for group, title, columns in (
        ("int8", "int8 over our bf16, cold", [*decode, "share_of_read_bandwidth"]),
        ("pair", "a gated pair over two calls", [*decode, "dense_ratio"]),
        ("together", "three layers in one call over three calls", decode),
    ):
        if cells := by_group.get(group):
            parts.append(f"**{title}**\n\n" + simple(cells, columns))
    if cells := by_group.get("overhead"):
        columns = ["dtype", "threads", "overhead_ratio", "packed_linear_ratio", "module_ratio"]
        columns.append("op_ratio")
        parts.append("**a 64x64 call over F.linear, nn.Linear**\n\n" + simple(cells, columns))
    if cells := by_group.get("pack"):
        columns = ["layer", "dtype", "calls", "gbytes_per_second", "memory_over_weight"]
        parts.append("**packing once, in calls at M = 1**\n\n" + simple(cells, columns))
    return "\n\n".join(parts)


def plot(rows: list[Row], path: Path) -> None:
    """Ratio against M for each layer, with the ideal line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells = [r for r in rows if r["group"] == "grid"]
    panels = list(dict.fromkeys((r["threads"], r["dtype"]) for r in cells))
    dtypes = len({dtype for _, dtype in panels})
    tall = len(panels) // dtypes
    figure, axes = plt.subplots(tall, dtypes, figsize=(6 * dtypes, 4 * tall), squeeze=False)
    for axis, (threads, dtype) in zip(axes.flat, panels, strict=True):
        for layer in dict.fromkeys(r["layer"] for r in cells):
            line = sorted(
                (r["m"], r["dense_ratio"])
                for r in cells
                if (r["layer"], r["dtype"], r["threads"]) == (layer, dtype, threads)
            )
            axis.plot(*zip(*line, strict=True), marker="o", label=layer)
        axis.axhline(IDEAL, color="black", linestyle="--", label=f"ideal {IDEAL:.2f}")
        axis.axhline(1, color="grey", linewidth=0.8)
        title = f"{dtype}, {threads} thread{'s' * (threads > 1)}"
        axis.set(title=title, xlabel="rows of x (M)", ylabel="times faster than dense F.linear")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    machines, parts = zip(*map(load, arguments.json), strict=True)
    for key in ABOUT:
        told = {str(machine.get(key)) for machine in machines}
        if len(told) > 1:
            parser.error(f"the files differ in {key}: {', '.join(sorted(told))}")
    rows = [row for part in parts for row in part]
    print(report(machines[0], rows))
    if arguments.png:
        plot(rows, arguments.png)


if __name__ == "__main__":
    main()
