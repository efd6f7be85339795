"""Turn pytest-benchmark JSON into the README's tables and a PNG.

python bench/table.py build/bench.json [--png build/bench.png] > build/bench.md
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from shapes import BATCHES, REMOVED

IDEAL = 1 / (1 - REMOVED)


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    data = json.loads(path.read_text())
    rows = [{"group": b["group"], **b["extra_info"]} for b in data["benchmarks"]]
    return data["machine_info"], rows


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def grid(rows: list[dict[str, Any]], key: str, title: str, form: str = "{:.2f}") -> str:
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


def simple(rows: list[dict[str, Any]], columns: list[str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in rows:
        cells = [r.get(c, "") for c in columns]
        text = [f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells]
        lines.append("| " + " | ".join(text) + " |")
    return "\n".join(lines)


def missed(rows: list[dict[str, Any]]) -> str:
    """Cells of the grid below the bars of docs/native.md, 1 to 3."""
    out = []
    for r in rows:
        m = r["m"]
        bar = 3.0 if m == 1 else 2.5 if m <= 8 else IDEAL
        faults = []
        if r["dense_ratio"] < bar:
            faults.append(f"{r['dense_ratio']:.2f} of {bar:.2f} over dense")
        if r["library_ratio"] < 1:
            faults.append(f"{r['library_ratio']:.2f} of {r['library']}")
        if m >= 64 and r["share_of_peak"] < 0.88:
            faults.append(f"{100 * r['share_of_peak']:.0f} % of peak")
        if faults:
            out.append(f"* {r['layer']} {r['dtype']} M={m} T={r['threads']}: {'; '.join(faults)}")
    return "\n".join(out) or "none"


def absences(rows: list[dict[str, Any]]) -> str:
    """Which libraries were not timed and why, each reason once with its number of cells."""
    reasons = Counter(pair for r in rows for pair in r.get("absent", {}).items())
    return "\n".join(f"* {name} ({n} cells): {why}" for (name, why), n in reasons.items()) or "none"


def report(machine: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    by_group = {g: [r for r in rows if r["group"] == g] for g in {r["group"] for r in rows}}
    about = [machine[key] for key in ("cpu_name", "isa", "torch", "clock")]
    parts = ["{}, {}, torch {}, {} time, {:.0%} removed".format(*about, REMOVED)]
    if cells := by_group.get("grid"):
        parts += [
            grid(cells, "dense_ratio", "times faster than dense F.linear, by M"),
            grid(cells, "fastest_dense_ratio", "times faster than the fastest dense runtime"),
            grid(cells, "library_ratio", "times faster than the best library GEMM, gathered shape"),
            grid(cells, "share_of_peak", "share of the arithmetic peak", "{:.0%}"),
            f"**below a bar**\n\n{missed(cells)}",
            f"**not timed**\n\n{absences(rows)}",
        ]
    if cells := by_group.get("compiled"):
        columns = ["layer", "dtype", "m", "threads", "compiled_ratio", "compiled_dense_ratio"]
        title = "**over torch.compile with freezing: gathered shape, dense layer**"
        parts.append(f"{title}\n\n{simple(cells, [*columns, 'library', 'library_ratio'])}")
    if cells := by_group.get("removed"):
        parts += [
            grid(
                [{**r, "layer": f"{r['layer']}, {r['removed']:.0%} removed"} for r in cells],
                "dense_ratio",
                "times faster than dense F.linear, by share removed",
            )
        ]
    if cells := by_group.get("cold"):
        columns = ["layer", "dtype", "m", "threads", "dense_ratio", "weight_gbytes_per_second"]
        parts.append("**cold weights**\n\n" + simple(cells, [*columns, "share_of_read_bandwidth"]))
    decode = ["layer", "dtype", "m", "threads", "ratio"]
    for group, title, columns in (
        ("int8", "int8 over our bf16, cold", [*decode, "share_of_read_bandwidth"]),
        ("pair", "a gated pair over two calls", [*decode, "dense_ratio"]),
        ("together", "three layers in one call over three calls", decode),
    ):
        if cells := by_group.get(group):
            parts.append(f"**{title}**\n\n" + simple(cells, columns))
    if cells := by_group.get("overhead"):
        parts.append("**a 64x64 call**\n\n" + simple(cells, ["dtype", "threads", "overhead_ratio"]))
    if cells := by_group.get("pack"):
        columns = ["layer", "dtype", "gbytes_per_second", "memory_over_weight"]
        parts.append("**packing**\n\n" + simple(cells, columns))
    return "\n\n".join(parts)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
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
    rows: list[dict[str, Any]] = []
    for path in arguments.json:
        machine, more = load(path)
        rows += more
    print(report(machine, rows))
    if arguments.png:
        plot(rows, arguments.png)


if __name__ == "__main__":
    main()
