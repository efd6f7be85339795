"""Turn the JSON of `finegates bench-model`, of several shapes, into the README's table and figure.

python bench/models.py bench/results/models/*.json [--png bench/results/models/all.png]

A cell is the optimised model's milliseconds (p50) and how many times less that is than the fastest
dense runtime's. Below stands what falls short of a bar.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from table import fault

OURS = ("pruned", "optimized")


class Cell(NamedTuple):
    """One work of one model with weights of a type on some threads: milliseconds by runtime."""

    shape: str
    kind: str
    work: str
    dtype: str
    threads: int
    times: dict[str, float]

    @property
    def dense(self) -> dict[str, float]:
        return {name: time for name, time in self.times.items() if name not in OURS}

    def ratio(self, peer: str | None = None) -> float:
        """How many times faster the optimised model is than a peer, or than the fastest."""
        dense = self.dense
        return (dense[peer] if peer else min(dense.values())) / self.times["optimized"]

    @property
    def name(self) -> str:
        return f"{self.shape} {self.dtype} {self.work} T={self.threads}"


def load(path: Path) -> list[Cell]:
    """Read one shape's cells, in the order of measurement."""
    bench = json.loads(path.read_text())
    cells: dict[tuple[Any, ...], dict[str, float]] = {}
    for result in bench["results"]:
        dtype, work, threads = (result["cell"][key] for key in ("dtype", "work", "threads"))
        key = (work["kind"], f"{work['kind']} {work['batch']}×{work['length']}", dtype, threads)
        cells.setdefault(key, {})
        if result["p50"] is not None:
            cells[key][result["runtime"]] = result["p50"]
    return [Cell(path.stem, *key, times) for key, times in cells.items()]


def missed(cell: Cell) -> str:
    """What of docs/serving.md's bars for 40 % removed a cell falls short of, or ""."""
    least = 1.5 if "llama.cpp" not in cell.dense else 1.0 if cell.kind == "decode" else 1.7
    faults = [fault(cell.ratio(), least, "times the fastest dense")]
    if cell.shape == "minilm":
        faults.append(fault(cell.ratio("transformers"), 2.5, "times transformers"))
    return "; ".join(filter(None, faults))


def table(cells: list[Cell]) -> str:
    """One line a work, one column a weight type and number of threads."""
    columns = list(dict.fromkeys((c.dtype, c.threads) for c in cells))
    heads = [f"{dtype}, {threads} thread{'s' * (threads > 1)}" for dtype, threads in columns]
    lines = [f"| shape | work | {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * len(heads)}"]
    for shape, work in dict.fromkeys((c.shape, c.work) for c in cells):
        here = {(c.dtype, c.threads): c for c in cells if (c.shape, c.work) == (shape, work)}
        texts = []
        for column in columns:
            ours = here[column].times["optimized"] if column in here else 0.0
            digits = ".3g" if ours < 1000 else ".0f"
            texts.append(f"{ours:{digits}} ms, {here[column].ratio():.2f}×" if ours else "–")
        lines.append(f"| {shape} | {work} | {' | '.join(texts)} |")
    return "\n".join(lines)


def plot(cells: list[Cell], path: Path) -> None:
    """Every cell's ratio to every dense runtime, by shape and weight type."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys((c.shape, c.dtype) for c in cells))
    peers = list(dict.fromkeys(name for c in cells for name in c.dense))
    figure, axis = plt.subplots(figsize=(1.1 * len(groups) + 2, 4), layout="constrained")
    for i, peer in enumerate(peers):
        offset = 0.12 * (i - (len(peers) - 1) / 2)
        dots = [
            (groups.index((c.shape, c.dtype)) + offset, c.ratio(peer))
            for c in cells
            if peer in c.dense
        ]
        axis.plot(*zip(*dots, strict=True), "o", markersize=4, alpha=0.7, label=peer)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(groups)), [f"{shape}\n{dtype}" for shape, dtype in groups])
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_ylabel("times faster than the dense model in …")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    shapes = [load(path) for path in arguments.json]
    by_weights: dict[tuple[str, ...], list[Cell]] = {}
    for cells in shapes:
        by_weights.setdefault(tuple(dict.fromkeys(c.dtype for c in cells)), []).extend(cells)
    for cells in by_weights.values():
        print(table(cells) + "\n")
    every = [c for cells in shapes for c in cells]
    print("**short of a bar**\n")
    print("\n".join(f"* {c.name}: {missed(c)}" for c in every if missed(c)) or "none")
    if arguments.png:
        plot(every, arguments.png)


if __name__ == "__main__":
    main()
