"""Turn the JSON of `finegates bench-model`, of several shapes, into the README's tables and figure.

python bench/models.py bench/results/models/zen5/*.json [--png bench/results/models/zen5/all.png]

Per share of the gated weights that was removed: the optimised model's times against the dense
runtimes', the serving processes' memory, and what falls short of docs/serving.md's bars.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from table import fault

from finegates.report.bench_model import OURS, Cell, ModelBench
from finegates.report.bench_table import lead, machine_text, milliseconds

# With 40 % removed: times faster than the fastest dense runtime, at the least.
ENCODER, PREFILL, DECODE = 1.5, 1.7, 1.0
MINILM = 2.5  # times faster than transformers
READING = 0.85  # of the bandwidth, decode of llama-1b in bf16
PEAK = 1.05  # of the dense process's peak memory less what was removed, at the most

LEGEND = """\
Milliseconds (p50) of the optimised model and how many times faster that is than the fastest dense \
runtime timed; of decode also the share of the measured bandwidth at which it reads its weights.
"""


def times(bench: ModelBench, cell: Cell) -> dict[str, float]:
    """Milliseconds by runtime."""
    results = bench.cells()[cell]
    return {name: result.p50 for name, result in results.items() if result.p50 is not None}


def missed(bench: ModelBench) -> Iterator[str]:
    """What of the bars for its sparsity a model falls short of, one line a cell, and of memory."""
    for cell in bench.cells():
        if faults := "; ".join(filter(None, cell_faults(bench, cell))):
            yield f"{bench.shape} {cell.dtype} {cell.work.label} T={cell.threads}: {faults}"
    if removed(bench) >= 0.4:
        yield from (f"{bench.shape} memory: {text}" for text in memory_faults(bench))


def cell_faults(bench: ModelBench, cell: Cell) -> Iterator[str]:
    """What a cell misses, "" for what it doesn't; a peer that wasn't timed is a miss."""
    taken, share = times(bench, cell), removed(bench)
    decoder = "decode" in {c.work.kind for c in bench.cells()}
    needed = [OURS[-1]] if cell.dtype == "int8" else [OURS[-1], "transformers"]
    if share >= 0.2:
        needed.append("llama.cpp" if decoder else "OpenVINO")
    if absent := [name for name in needed if name not in taken]:
        yield f"{' and '.join(absent)} not timed"
        return
    if share < 0.2:
        yield fault(taken["transformers"] / taken[OURS[-1]], 1.0, "times transformers")
        return
    ratio = lead(bench.cells()[cell].values())
    assert ratio is not None
    least = 1.0
    if share >= 0.4:
        least = ENCODER if not decoder else DECODE if cell.work.kind == "decode" else PREFILL
    yield fault(ratio[0], least, "times the fastest dense")
    if share >= 0.4 and bench.shape == "minilm":
        yield fault(taken["transformers"] / taken[OURS[-1]], MINILM, "times transformers")
    if share >= 0.4 and bench.shape == "llama-1b" and (cell.dtype, cell.work.kind) == (
        "bf16", "decode",
    ):  # fmt: skip
        reading = bench.cells()[cell][OURS[-1]].share_of_bandwidth
        yield "no bandwidth" if reading is None else fault(reading, READING, "of bandwidth")


def removed(bench: ModelBench) -> float:
    """The fraction of the gated weights that was removed."""
    if bench.sparsity is None:
        raise ValueError(f"{bench.model} was timed without --shape, so no bar is stated for it")
    return bench.sparsity


def memory_faults(bench: ModelBench) -> Iterator[str]:
    """What the optimised model's serving processes take too much."""
    allowed = allowed_peak(bench)
    if allowed is None:
        yield "not measured"
        return
    for form in bench.memory:
        if form.model.startswith(OURS[-1]):
            what = f"of dense less what was removed ({form.model})"
            if text := fault(form.peak / allowed, PEAK, what, least=False):
                yield text


def allowed_peak(bench: ModelBench) -> float | None:
    """The dense process's peak less the weights that were removed, where it was measured."""
    forms = {form.model: form for form in bench.memory}
    if not {"dense", *OURS} <= forms.keys():
        return None
    return forms["dense"].peak - (forms["dense"].weights - forms["pruned"].weights)


def table(benches: Sequence[ModelBench]) -> str:
    """One line a work, one column a weight type and number of threads."""
    cells = [cell for bench in benches for cell in bench.cells()]
    columns = list(dict.fromkeys((c.dtype, c.threads) for c in cells))
    heads = [f"{dtype}, {threads} thread{'s' * (threads > 1)}" for dtype, threads in columns]
    lines = [f"| shape | work | {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * len(heads)}"]
    for bench in benches:
        for work in dict.fromkeys(c.work for c in bench.cells()):
            texts = [cell_text(bench, Cell(dtype, work, threads)) for dtype, threads in columns]
            lines.append(f"| {bench.shape} | {work.label} | {' | '.join(texts)} |")
    return "\n".join(lines)


def cell_text(bench: ModelBench, cell: Cell) -> str:
    """The optimised model's time, its lead and its share of the bandwidth."""
    results = bench.cells().get(cell, {})
    ratio = lead(results.values())
    if ratio is None:
        return "–"
    ours = results[OURS[-1]]
    text = f"{milliseconds(ours)} ms, {ratio[0]:.2f}×"
    share = ours.share_of_bandwidth
    return text if share is None else f"{text}, {100 * share:.0f} %"


def memory_table(benches: Sequence[ModelBench]) -> str:
    """Weights and peaks of the serving processes, and what the optimised one may take."""
    lines = ["| MB | weights | peak of dense | allowed | peak of ours | the same, int8 |"]
    lines.append("| --- |" + " ---: |" * 5)
    for bench in benches:
        allowed, forms = allowed_peak(bench), {form.model: form for form in bench.memory}
        if allowed is None:
            continue
        weights = " → ".join(f"{forms[name].weights / 1e6:.0f}" for name in ("dense", "pruned"))
        peaks = [forms["dense"].peak, PEAK * allowed, forms[OURS[-1]].peak]
        peaks += [form.peak for name, form in forms.items() if name.endswith("int8")]
        texts = [f"{peak / 1e6:.0f}" for peak in peaks]
        texts += [""] * (4 - len(texts))
        lines.append(f"| {bench.shape} | {weights} | {' | '.join(texts)} |")
    return "\n".join(lines)


def section(share: float, benches: Sequence[ModelBench]) -> str:
    """Everything about one share of removed weights."""
    parts = [f"## {100 * share:g} % of the gated weights removed"]
    by_weights: dict[tuple[str, ...], list[ModelBench]] = {}
    for bench in benches:
        weights = tuple(dict.fromkeys(c.dtype for c in bench.cells()))
        by_weights.setdefault(weights, []).append(bench)
    parts += map(table, by_weights.values())
    if any(bench.memory for bench in benches):
        parts.append(memory_table(benches))
    faults = [f"* {text}" for bench in benches for text in missed(bench)]
    parts += ["**short of a bar**", "\n".join(faults) or "none"]
    return "\n\n".join(parts)


def plot(by_share: dict[float, list[ModelBench]], path: Path) -> None:
    """Every cell's ratio to every dense runtime, by shape and weight type; a panel a share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    every = [bench for benches in by_share.values() for bench in benches]
    groups = list(dict.fromkeys(f"{b.shape}\n{c.dtype}" for b in every for c in b.cells()))
    names = sorted({r.runtime for bench in every for r in bench.results if r.p50} - set(OURS))
    size = (1.1 * len(groups) + 2, 3.2 * len(by_share) + 0.8)
    figure, axes = plt.subplots(
        len(by_share), 1, figsize=size, squeeze=False, sharex=True, layout="constrained"
    )
    for axis, (share, benches) in zip(axes.flat, by_share.items(), strict=True):
        for i, peer in enumerate(names):
            offset = 0.12 * (i - (len(names) - 1) / 2)
            dots = [
                (
                    groups.index(f"{bench.shape}\n{cell.dtype}") + offset,
                    taken[peer] / taken[OURS[-1]],
                )
                for bench in benches
                for cell in bench.cells()
                if peer in (taken := times(bench, cell)) and OURS[-1] in taken
            ]
            axis.plot(*zip(*dots, strict=True) if dots else ([], []), "o", markersize=4,
                      color=f"C{i}", alpha=0.7, label=peer)  # fmt: skip
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(groups)), groups)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylabel("times faster than dense in …")
        axis.set_title(f"{100 * share:g} % of the gated weights removed", fontsize=10, loc="left")
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, nargs="+", help="of `finegates bench-model --shape`")
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    by_share: dict[float, list[ModelBench]] = {}
    measured: dict[str, list[str]] = {}
    for path in arguments.json:
        bench = ModelBench.from_dict(json.loads(path.read_text()))
        by_share.setdefault(removed(bench), []).append(bench)
        measured.setdefault(machine_text(bench.machine), []).append(path.stem)
    by_share = dict(sorted(by_share.items(), reverse=True))
    print(LEGEND)
    for machine, names in measured.items():
        print(f"* {machine}: {', '.join(names)}")
    for share, benches in by_share.items():
        print("\n" + section(share, benches))
    if arguments.png:
        plot(by_share, arguments.png)


if __name__ == "__main__":
    main()
