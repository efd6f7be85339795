"""Turn the JSON of `finegates bench-model`, of several shapes, into the README's table and figure.

python bench/models.py bench/results/models/*.json [--png bench/results/models/all.png]

A cell is the optimised model's milliseconds (p50) and how many times less that is than the fastest
dense runtime's. Below stands what falls short of docs/serving.md's bars for 40 % removed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from table import fault

from finegates.report.bench_model import OURS, Cell, ModelBench
from finegates.report.bench_table import lead, milliseconds

# Times faster than the fastest dense runtime, at the least.
ENCODER, PREFILL, DECODE = 1.5, 1.7, 1.0
MINILM = 2.5  # times faster than transformers

Shapes = dict[str, ModelBench]  # by the name of the shape


def times(bench: ModelBench, cell: Cell) -> dict[str, float]:
    """Milliseconds by runtime."""
    results = bench.cells()[cell]
    return {name: result.p50 for name, result in results.items() if result.p50 is not None}


def missed(shape: str, bench: ModelBench, cell: Cell) -> str:
    """What of the bars a cell falls short of, a peer that wasn't timed among them, or ""."""
    ratio = lead(bench.cells()[cell].values())
    if ratio is None:
        return "no dense runtime was timed"
    taken, decoder = times(bench, cell), "decode" in {c.work.kind for c in bench.cells()}
    least = ENCODER if not decoder else DECODE if cell.work.kind == "decode" else PREFILL
    faults = [fault(ratio[0], least, "times the fastest dense")]
    if decoder and "llama.cpp" not in taken:
        faults.append("llama.cpp was not timed")
    if shape == "minilm":
        over = taken["transformers"] / taken[OURS[-1]]
        faults.append(fault(over, MINILM, "times transformers"))
    return "; ".join(filter(None, faults))


def table(shapes: Shapes) -> str:
    """One line a work, one column a weight type and number of threads."""
    cells = [cell for bench in shapes.values() for cell in bench.cells()]
    columns = list(dict.fromkeys((c.dtype, c.threads) for c in cells))
    heads = [f"{dtype}, {threads} thread{'s' * (threads > 1)}" for dtype, threads in columns]
    lines = [f"| shape | work | {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * len(heads)}"]
    for shape, bench in shapes.items():
        for work in dict.fromkeys(c.work for c in bench.cells()):
            texts = []
            for dtype, threads in columns:
                results = bench.cells().get(Cell(dtype, work, threads), {})
                ratio = lead(results.values())
                ours = milliseconds(results.get(OURS[-1]))
                texts.append("–" if ratio is None else f"{ours} ms, {ratio[0]:.2f}×")
            lines.append(f"| {shape} | {work.label} | {' | '.join(texts)} |")
    return "\n".join(lines)


def plot(shapes: Shapes, path: Path) -> None:
    """Every cell's ratio to every dense runtime, by shape and weight type."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dots: dict[str, list[tuple[str, float]]] = {}
    for shape, bench in shapes.items():
        for cell in bench.cells():
            taken = times(bench, cell)
            for name in taken.keys() - set(OURS):
                ratio = taken[name] / taken[OURS[-1]]
                dots.setdefault(name, []).append((f"{shape}\n{cell.dtype}", ratio))
    groups = list(
        dict.fromkeys(f"{s}\n{c.dtype}" for s, bench in shapes.items() for c in bench.cells())
    )
    figure, axis = plt.subplots(figsize=(1.1 * len(groups) + 2, 4), layout="constrained")
    for i, peer in enumerate(sorted(dots)):
        offset = 0.12 * (i - (len(dots) - 1) / 2)
        places = [(groups.index(group) + offset, ratio) for group, ratio in dots[peer]]
        axis.plot(*zip(*places, strict=True), "o", markersize=4, alpha=0.7, label=peer)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(groups)), groups)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_ylabel("times faster than the dense model in …")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, nargs="+", help="one a shape, named after it")
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    shapes = {p.stem: ModelBench.from_dict(json.loads(p.read_text())) for p in arguments.json}
    by_weights: dict[tuple[str, ...], Shapes] = {}
    for shape, bench in shapes.items():
        weights = tuple(dict.fromkeys(c.dtype for c in bench.cells()))
        by_weights.setdefault(weights, {})[shape] = bench
    for alike in by_weights.values():
        print(table(alike) + "\n")
    print("**short of a bar**\n")
    faults = [
        f"* {shape} {cell.dtype} {cell.work.label} T={cell.threads}: {text}"
        for shape, bench in shapes.items()
        for cell in bench.cells()
        if (text := missed(shape, bench, cell))
    ]
    print("\n".join(faults) or "none")
    if arguments.png:
        plot(shapes, arguments.png)


if __name__ == "__main__":
    main()
