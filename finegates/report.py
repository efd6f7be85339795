"""What a run reports: counts, latencies, kept rows and columns, one table, a figure and JSON."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .gates import Gate
from .nn import FusedGatedLinear, PrunedLinear
from .surgery import GateMap, Removal, Side

REPORT_VERSION = 1


@dataclass(frozen=True)
class Kept:
    """What is left of one Linear.

    Args:
        name: of the module.
        rows, columns: N and K before.
        kept_rows, kept_columns: n and k after.
    """

    name: str
    rows: int
    columns: int
    kept_rows: int
    kept_columns: int

    @property
    def fraction(self) -> float:
        """Kept fraction of the weight, n k / (N K)."""
        return self.kept_rows * self.kept_columns / (self.rows * self.columns)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the fraction, as JSON values."""
        return {**asdict(self), "fraction": self.fraction}


@dataclass(frozen=True)
class Timing:
    """Latency of one model on one input at one number of threads.

    Args:
        model, inputs, threads: what was timed.
        median, p10, p90: milliseconds.
        speedup: the first model's time over this one's, median over the rounds.
        rounds: how many times each model ran.
    """

    model: str
    inputs: str
    threads: int
    median: float
    p10: float
    p90: float
    speedup: float
    rounds: int


@dataclass(frozen=True)
class Row:
    """One model of the main job's table.

    Args:
        model: its name, the key under which `latency` timed it.
        score: the task's deciding metric, as a fraction.
        trainable: parameters that were trained, gates included.
        requested, removed: fraction of the gated weights; None where nothing is to be removed.
        removed_of_model: fraction of the whole model's parameters.
        disk: bytes of the saved folder.
    """

    model: str
    score: float
    trainable: int | None = None
    requested: float | None = None
    removed: float | None = None
    removed_of_model: float | None = None
    disk: int | None = None


@dataclass(frozen=True)
class Report:
    """Everything `write_report` writes.

    Args:
        job: the task, the model and the settings, JSON values only.
        metric: the name of the rows' score.
        rows, timings, layers: see their classes.
    """

    job: Mapping[str, Any]
    metric: str
    rows: Sequence[Row]
    timings: Sequence[Timing] = ()
    layers: Sequence[Kept] = ()
    machine: Mapping[str, Any] = field(default_factory=lambda: machine())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the schema's version."""
        return {
            "version": REPORT_VERSION,
            "job": dict(self.job),
            "machine": dict(self.machine),
            "metric": self.metric,
            "rows": [asdict(row) for row in self.rows],
            "timings": [asdict(timing) for timing in self.timings],
            "layers": [layer.to_dict() for layer in self.layers],
        }


# -- counts ----------------------------------------------------------------------------------------


def kept(before: nn.Module, after: nn.Module, names: Sequence[str] | None = None) -> list[Kept]:
    """Return what is left of each Linear.

    Args:
        before: the dense or the gated model, for the sizes; it may be on the meta device.
        after: the pruned model, or the gated one, whose dead rows and columns count as removed.
        names: the Linears; None takes those that are gated in either model or pruned in ``after``.

    Raises:
        ValueError: a name isn't a Linear in both models, or nothing is gated or pruned.
    """
    if names is None:
        chosen = {n for n, m in before.named_modules() if isinstance(m, FusedGatedLinear)}
        kinds = (FusedGatedLinear, PrunedLinear)
        chosen |= {n for n, m in after.named_modules() if isinstance(m, kinds)}
        names = [name for name, _ in after.named_modules() if name in chosen]
        if not names:
            raise ValueError("after has no gated or pruned Linear; name the Linears")
    gated = any(isinstance(module, FusedGatedLinear) for module in after.modules())
    alive = {side: int(a.sum()) for side, a in GateMap(after).alive().items()} if gated else {}
    layers = []
    for name in names:
        rows, columns = _shape("before", before, name)
        kept_rows, kept_columns = _shape("after", after, name)
        kept_rows = alive.get(Side(name, "row"), kept_rows)
        kept_columns = alive.get(Side(name, "column"), kept_columns)
        layers.append(Kept(name, rows, columns, kept_rows, kept_columns))
    return layers


def _shape(argument: str, model: nn.Module, name: str) -> tuple[int, int]:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"names: {argument} has no module {name!r}") from None
    if not isinstance(module, (nn.Linear, PrunedLinear)):
        raise ValueError(f"names: {name!r} of {argument} is a {type(module).__name__}, no Linear")
    rows, columns = module.weight.shape
    return rows, columns


def removal(layers: Sequence[Kept]) -> Removal:
    """Sum up the parameters of the layers' weights, and those removed."""
    total = sum(layer.rows * layer.columns for layer in layers)
    return Removal(total, total - sum(layer.kept_rows * layer.kept_columns for layer in layers))


def model_removal(before: nn.Module, after: nn.Module) -> Removal:
    """Count the whole model's parameters, and those removed: weights and biases, no gates.

    Args:
        before: the dense or the gated model.
        after: the pruned model, or the gated one, whose dead rows and columns count as removed.
    """
    total = parameters(before)
    if not any(isinstance(module, FusedGatedLinear) for module in after.modules()):
        return Removal(total, total - parameters(after))
    removed = 0
    for layer in kept(after, after):
        removed += layer.rows * layer.columns - layer.kept_rows * layer.kept_columns
        if getattr(after.get_submodule(layer.name), "bias", None) is not None:
            removed += layer.rows - layer.kept_rows
    return Removal(total, removed)


def parameters(model: nn.Module) -> int:
    """Return the number of parameters without gates; shared ones count once."""
    gates = {id(p) for m in model.modules() if isinstance(m, Gate) for p in m.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in gates)


def trainable(model: nn.Module) -> int:
    """Return the number of parameters that get a gradient, gates included; shared count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def folder_size(path: str | os.PathLike[str]) -> int:
    """Return the bytes of all files of a folder.

    Raises:
        ValueError: it is not a folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"path must be a folder, got {str(path)!r}")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# -- latency ---------------------------------------------------------------------------------------


@torch.inference_mode()
def latency(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Mapping[str, Tensor] | Tensor],
    threads: Sequence[int] | None = None,
    *,
    seconds: float = 5.0,
    warmup: int = 3,
    min_rounds: int = 10,
    max_rounds: int = 300,
) -> list[Timing]:
    """Time models against each other: same process, same inputs, interleaved.

    A round runs every model once, starting with another one each time, so that drift of the
    machine meets all alike. Models run in evaluation mode without gradients, and the garbage
    collector is off while the clock runs.

    Args:
        models: the first one is the baseline of the speed-ups.
        inputs: per label a tensor, or a mapping of keyword arguments.
        threads: torch thread counts; None takes 1 and the current number.
        seconds: time budget for every pair of input and thread count.
        warmup: untimed runs of each model before.
        min_rounds, max_rounds: bounds that go before the budget.

    Returns:
        One `Timing` per input, thread count and model.

    Raises:
        ValueError: there is no model or no input, or a number is below 1.

    Example:
        >>> models = {"wide": nn.Linear(64, 64), "narrow": nn.Linear(64, 8)}
        >>> timings = latency(models, {"batch 1": torch.ones(1, 64)}, [1], seconds=0.01)
        >>> [(t.model, t.inputs, t.threads) for t in timings]
        [('wide', 'batch 1', 1), ('narrow', 'batch 1', 1)]
    """
    for argument, value in (("models", models), ("inputs", inputs)):
        if not value:
            raise ValueError(f"{argument} must not be empty")
    counts = {"min_rounds": min_rounds, "max_rounds": max_rounds}
    counts.update({} if threads is None else {"threads": min(threads, default=0)})
    for argument, count in counts.items():
        if count < 1:
            raise ValueError(f"{argument} must be at least 1, got {count}")
    if threads is None:
        threads = sorted({1, torch.get_num_threads()})
    timings = []
    with _measuring(models.values()):
        for label, values in inputs.items():
            calls = {name: _call(model, values) for name, model in models.items()}
            for count in threads:
                torch.set_num_threads(count)
                times = _interleave(calls, seconds, warmup, min_rounds, max_rounds)
                baseline = next(iter(times.values()))
                timings += [
                    _timing(name, label, count, series, baseline) for name, series in times.items()
                ]
    return timings


@contextmanager
def _measuring(models: Any) -> Iterator[None]:
    """Evaluation mode, no garbage collection; restores both and the number of threads."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    for module, _ in modes:
        module.training = False
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for module, mode in modes:
            module.training = mode
        if collecting:
            gc.enable()


def _call(model: nn.Module, values: Mapping[str, Tensor] | Tensor) -> Callable[[], Any]:
    tensors = [values] if isinstance(values, Tensor) else list(values.values())
    cuda = any(tensor.is_cuda for tensor in tensors)

    def call() -> None:
        _ = model(values) if isinstance(values, Tensor) else model(**values)
        if cuda:
            torch.cuda.synchronize()

    return call


def _interleave(
    calls: Mapping[str, Callable[[], Any]], seconds: float, warmup: int, fewest: int, most: int
) -> dict[str, list[float]]:
    """Return each call's times in milliseconds, one per round."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for round_ in range(max(fewest, most)):
        if round_ >= fewest and time.perf_counter() >= end:
            break
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter_ns()
            calls[name]()
            times[name].append((time.perf_counter_ns() - start) / 1e6)
    return times


def _timing(
    model: str, inputs: str, threads: int, times: Sequence[float], baseline: Sequence[float]
) -> Timing:
    ranked = sorted(times)
    p10, p90 = (ranked[math.floor(q * (len(ranked) - 1) + 0.5)] for q in (0.1, 0.9))
    speedup = statistics.median(b / t for b, t in zip(baseline, times, strict=True))
    return Timing(model, inputs, threads, statistics.median(times), p10, p90, speedup, len(times))


# -- what is printed and written -------------------------------------------------------------------


def table(report: Report) -> Any:
    """Return the report as a ``rich`` table, a column per model; five models fit 80 columns."""
    from rich import box
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
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


def _lines(report: Report) -> list[list[str]]:
    """Return the table's lines, each a title and a cell per model; lines without values drop."""

    def line(title: str, value: Callable[[Row], float | None], form: Any) -> list[str]:
        values = [value(row) for row in report.rows]
        return [title, *("" if v is None else form(v) for v in values)]

    lines = [
        line(report.metric, lambda row: row.score, _percent),
        line("gated weights, requested", lambda row: row.requested, _percent),
        line("gated weights, removed", lambda row: row.removed, _percent),
        line("whole model, removed", lambda row: row.removed_of_model, _percent),
        line(
            "trained parameters", lambda row: row.trainable, lambda v: _unit(v, ("", "k", "M", "G"))
        ),
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
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside the path, renamed to it at the end."""
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".finegates-") as folder:
        temporary = Path(folder, target.name)
        yield temporary
        os.replace(temporary, target)


def machine() -> dict[str, Any]:
    """Return the facts that latencies depend on."""
    return {
        "cpu": cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """Return the processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


# -- the figure ------------------------------------------------------------------------------------

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
    with _replacing(path) as temporary:
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
