"""Where a pruned model's time goes, layer by layer, against its dense-shaped twin."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..export import dense_model
from ..nn import PrunedLinear
from ..ops import _cpu, _cpu_blocks
from ..serving import PackedLinear
from ..serving.fused import FusedBlock
from .ceilings import peak_flops, reading, weight_bytes
from .module_clock import LINEARS, ModuleClock
from .timing import interleave, machine, threads_set_to
from .why import EXPLAINED, FLOORS, REASONS, losses, why_not_faster
from .work import Work, serve

# Kept counts that leave no remainder in any kernel: its widest panel, and a cache line of bf16.
_PANEL = 64
Clock = Callable[[], float]


@dataclass(frozen=True)
class LayerProfile:
    """One Linear, or the Linears of one stage of a fused stack.

    Args:
        name: of the module.
        m: rows of the input.
        shapes: N, K and what is kept of both, per Linear.
        seconds, dense_seconds: in the pruned model and in the dense twin, both in place.
        floors: seconds by name, see `finegates.report.why`.
        aligned: time with aligned counts over this one, where that was measured.
        reason: why it isn't faster.
        estimated: whether the seconds are those of the block's own forward over the same packed
            Linears, because its native call doesn't time its parts.
    """

    name: str
    m: int
    shapes: Sequence[tuple[int, int, int, int]]
    seconds: float
    dense_seconds: float
    floors: Mapping[str, float]
    aligned: float | None
    reason: str
    estimated: bool = False

    @property
    def kept(self) -> float:
        """Share of the weights that is left; its inverse is the ideal speed-up."""
        left = sum(n * k for _, _, n, k in self.shapes)
        return left / sum(rows * columns for rows, columns, _, _ in self.shapes)

    @property
    def achieved(self) -> float:
        """The dense time over this one."""
        return self.dense_seconds / self.seconds if self.seconds else math.nan

    def share(self, floor: str) -> float:
        """Return the part of the time that a floor explains, the share of that ceiling."""
        return self.floors[floor] / self.seconds if self.seconds else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        shares = {f"share_of_{floor}": self.share(floor) for floor in FLOORS}
        return {**asdict(self), "kept": self.kept, "achieved": self.achieved, **shares}


@dataclass(frozen=True)
class ModelProfile:
    """The whole model.

    Args:
        model, work, dtype, threads: what was measured.
        seconds, dense_seconds: of a call, without any hook.
        parts, dense_parts: seconds by part, with the hooks' cost taken off; ``rest`` is what no
            timed module took: activations, residual sums, Python.
        layers: the Linears.
        ceilings: ``flops``, ``bytes`` a second and ``call`` seconds that the floors come from.
    """

    model: str
    work: Work
    dtype: str
    threads: int
    seconds: float
    dense_seconds: float
    parts: Mapping[str, float]
    dense_parts: Mapping[str, float]
    layers: Sequence[LayerProfile]
    ceilings: Mapping[str, float]
    machine: Mapping[str, Any] = field(default_factory=machine)

    def losses(self) -> dict[str, float]:
        """Return the seconds lost by reason, largest first.

        A Linear loses what it takes beyond its kept share of the dense time; every other part its
        whole time.
        """
        by_reason: dict[str, float] = {}
        for layer in self.layers:
            lost = layer.seconds - layer.kept * layer.dense_seconds
            if lost > 0:
                by_reason[layer.reason] = by_reason.get(layer.reason, 0.0) + lost
        return losses(self.parts, by_reason)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            **asdict(self),
            "machine": dict(self.machine),
            "layers": [layer.to_dict() for layer in self.layers],
            "losses": self.losses(),
        }


@torch.inference_mode()
def profile_model(
    model: Any, work: Work, *, name: str = "", threads: int = 1, seconds: float = 5.0
) -> ModelProfile:
    """Profile a pruned model, optimised or not, against its dense twin, both run in turn.

    One thread is timed by its own clock, which other processes stretch less than the wall's.

    Args:
        model: a `PreTrainedModel`; it is not changed.
        work: what it does in a call.
        name: of the model, in words.
        threads: torch's number of threads.
        seconds: time budget of half the calls: without hooks and with them, in turn.

    Raises:
        ValueError: a gated model, or there are no native kernels, so no ceilings.
    """
    dense = dense_model(model)
    with threads_set_to(threads):
        calls = {"dense": serve(dense, work), "model": serve(model, work)}
        clock = time.thread_time if threads == 1 else time.perf_counter
        ours = ModuleClock(model, [""], clock)
        blocks = [n for n, part in ours.parts.items() if part == "block"]
        theirs = ModuleClock(dense, ["", *blocks], clock)
        apart = _apart(model)
        native: list[Tensor] = []

        def hooked() -> None:
            with _cpu_blocks.timed_stages() as found:
                ours.run(calls["model"])
            native.extend(found)

        every = {**calls, "dense, hooks": lambda: theirs.run(calls["dense"]), "hooks": hooked}
        if apart is not None:
            parts_of_it, call = ModuleClock(apart, clock=clock), serve(apart, work)
            every["apart"] = lambda: parts_of_it.run(call)
        times = interleave(every, len(every) * seconds / 2, max_rounds=60, clock=clock)
        whole = {name: statistics.median(times[name]) for name in calls}
        ceilings = _ceilings(model, threads, clock)
        stages = _stages(model, ours, native)
        if apart is not None:
            stages += _estimated_stages(model, ours, parts_of_it, ceilings, clock)
        layers = _layers(model, dense, ours, theirs, stages, ceilings, clock)
    return ModelProfile(
        name or type(model).__name__,
        work,
        str(model.dtype).removeprefix("torch."),
        threads,
        whole["model"],
        whole["dense"],
        _parts(ours, stages),
        _parts(theirs, ()),
        layers,
        ceilings,
    )


@dataclass(frozen=True)
class _Stage:
    """Seconds of one stage of a fused block's native call, and the Linears it runs."""

    block: str
    part: str
    linears: tuple[str, ...]
    seconds: float
    estimated: bool = False


def _stages(model: nn.Module, ours: ModuleClock, calls: Sequence[Tensor]) -> list[_Stage]:
    """Return medians over calls, of a model with one stack; none where no call timed itself.

    They are the wall's. Where the clock of the modules saw less, other processes were at it, and
    all stages shrink to what it saw.
    """
    stacks = {
        name: module.stages()
        for name, module in model.named_modules()
        if isinstance(module, FusedBlock) and module.stages()
    }
    if len(stacks) != 1 or not calls:
        return []
    [(block, stages)] = stacks.items()
    medians = torch.stack(list(calls)).median(0).values
    factor = min(1.0, ours.inclusive()[block] / float(medians.sum()))
    return [
        _Stage(block, part, tuple(f"{block}.{name}" for name in names), factor * seconds)
        for (part, names), seconds in zip(stages, medians.tolist(), strict=True)
    ]


def _apart(model: nn.Module) -> nn.Module | None:
    """Return a copy whose blocks that don't time themselves take their own forward, if any."""

    def untimed(root: nn.Module) -> list[FusedBlock]:
        return [m for m in root.modules() if isinstance(m, FusedBlock) and not m.stages()]

    if not untimed(model):
        return None
    copied = copy.deepcopy(model)
    for block in untimed(copied):
        block.release()
    return copied


def _estimated_stages(
    model: nn.Module,
    ours: ModuleClock,
    apart: ModuleClock,
    ceilings: Mapping[str, float],
    clock: Clock,
) -> list[_Stage]:
    """Return what a block's time goes into, for blocks whose native call doesn't tell.

    Linears and norms take what they take in the block's own forward, Linears a call's overhead less
    but no less than their largest other floor; Python is what the block takes for no rows;
    attention is what remains. Where the others are more than the block they shrink to it.
    """

    def linear(name: str) -> float:
        floors = _floors([model.get_submodule(name)], apart.rows[name], 0.0, ceilings)
        return max(*floors.values(), apart_seconds[name] - ceilings["call"])

    seconds, apart_seconds, found = ours.inclusive(), apart.inclusive(), []
    for name, block in model.named_modules():
        if not isinstance(block, FusedBlock) or block.stages() or name not in seconds:
            continue
        within = [n for n in apart.parts if n.startswith(f"{name}.")]
        linears = tuple(n for n in within if apart.parts[n] == "linear")
        if any(n in seconds for n in linears):  # it took its own forward
            continue
        parts: list[tuple[str, tuple[str, ...], float]] = [
            *(("linear", (n,), linear(n)) for n in linears),
            ("norm", (), sum(apart_seconds[n] for n in within if apart.parts[n] == "norm")),
            ("rest", (), _no_rows(block, model.get_submodule(linears[0]), clock)),
        ]
        total = sum(taken for _, _, taken in parts)
        factor = min(1.0, seconds[name] / total)
        parts.append(("attention", (), max(0.0, seconds[name] - total)))
        found += [_Stage(name, part, names, factor * taken, True) for part, names, taken in parts]
    return found


def _no_rows(block: nn.Module, first: Any, clock: Clock) -> float:
    """Return what a block takes for an empty batch: checks and the native call."""
    x = torch.empty(0, 1, first.in_features, dtype=first.dtype)
    return _median({"": lambda: block(x)}, clock)[""]


def _parts(clock: ModuleClock, stages: Sequence[_Stage]) -> dict[str, float]:
    """Sum up the modules by part; the stages of a fused block say what is whose."""
    parts = {"linear": 0.0, **dict.fromkeys(REASONS, 0.0)}
    staged: dict[str, float] = {}
    for stage in stages:
        parts[stage.part] += stage.seconds
        staged[stage.block] = staged.get(stage.block, 0.0) + stage.seconds
    for name, seconds in clock.exclusive().items():
        part = clock.parts[name]
        seconds = max(0.0, seconds - staged.get(name, 0.0))
        parts["rest" if part == "block" else part] += seconds
    return parts


def _ceilings(model: nn.Module, threads: int, clock: Clock) -> dict[str, float]:
    """Measure what the floors come from."""
    kinds = [m for m in model.modules() if isinstance(m, LINEARS)]
    dtype = next(model.parameters()).dtype
    return {
        "flops": peak_flops(dtype, threads),
        "bytes": reading(model, threads)[1],
        "call": _call_seconds(kinds[0] if kinds else nn.Linear(1, 1), dtype, clock),
    }


def _call_seconds(like: nn.Module, dtype: torch.dtype, clock: Clock) -> float:
    """Return what the smallest layer of a class takes a call."""
    tiny: nn.Module = nn.Linear(16, 16, dtype=dtype)
    if not isinstance(like, nn.Linear):
        tiny = PrunedLinear(16, 16, 15, 15, dtype=dtype)
    if isinstance(like, PackedLinear):
        tiny = PackedLinear(tiny)  # type: ignore[arg-type]
    x = torch.ones(1, 16, dtype=dtype)
    return _median({"": lambda: tiny(x)}, clock)[""]


def _layers(
    model: nn.Module,
    dense: nn.Module,
    ours: ModuleClock,
    theirs: ModuleClock,
    stages: Sequence[_Stage],
    ceilings: Mapping[str, float],
    clock: Clock,
) -> list[LayerProfile]:
    seconds, dense_seconds = ours.inclusive(), theirs.inclusive()

    def rows(name: str, inner: Sequence[str]) -> int:
        return ours.rows.get(name) or max((theirs.rows.get(n, 1) for n in inner), default=1)

    def shapes(inner: Sequence[str]) -> list[tuple[int, int, int, int]]:
        return [_shape(model.get_submodule(n), dense.get_submodule(n)) for n in inner]

    def layer(
        name: str,
        inner: Sequence[str],
        taken: float,
        dense_taken: float,
        call: float,
        estimated: bool = False,
    ) -> LayerProfile:
        m = rows(name, inner)
        linears = [model.get_submodule(n) for n in inner]
        limits, aligned = _floors(linears, m, call, ceilings), None
        if max(limits.values()) < EXPLAINED * taken:
            aligned = _aligned(linears, m, clock)
        reason = why_not_faster(taken, limits, aligned)
        return LayerProfile(
            name, m, shapes(inner), taken, dense_taken, limits, aligned, reason, estimated
        )

    layers = []
    for stage in stages:
        inner = stage.linears
        if not inner:
            continue
        name = inner[0] + "".join(f", {n.rpartition('.')[2]}" for n in inner[1:])
        whole = sum(dense_seconds[n] for n in inner)
        # One call for the whole block.
        layers.append(layer(name, inner, stage.seconds, whole, 0.0, stage.estimated))
    for name, part in ours.parts.items():
        if part == "linear" and name in seconds:
            call = ceilings["call"]
            layers.append(layer(name, (name,), seconds[name], dense_seconds[name], call))
    return layers


def _floors(
    linears: Sequence[Any], m: int, call: float, ceilings: Mapping[str, float]
) -> dict[str, float]:
    """Return the seconds that m rows through these Linears take at the least, by reason."""
    kept = [_kept(layer) for layer in linears]
    return {
        "overhead": call,
        "bandwidth": sum(weight_bytes(layer) for layer in linears) / ceilings["bytes"],
        "compute": 2 * m * sum(n * k for n, k in kept) / ceilings["flops"],
    }


def _shape(layer: Any, dense: Any) -> tuple[int, int, int, int]:
    return (*dense.weight.shape, *_kept(layer))


def _kept(layer: Any) -> tuple[int, int]:
    """Return the kept rows and columns."""
    if isinstance(layer, PackedLinear):
        layout = _cpu.describe(layer.packed)
        return layout.n_rows, layout.n_columns
    n, k = layer.weight.shape
    return n, k


def _aligned(layers: Sequence[Any], m: int, clock: Clock) -> float | None:
    """Return the layers' time with kept counts of whole panels over their own, None where they are.

    Both run by themselves, in turn.
    """
    others = [_widened(layer) for layer in layers]
    if others == list(layers):
        return None
    first = layers[0]
    dtype = first.dtype if isinstance(first, PackedLinear) else first.weight.dtype
    x = torch.randn(m, first.in_features, dtype=dtype)

    def run(them: Sequence[Any]) -> None:
        for layer in them:
            layer(x)

    times = _median({"ours": lambda: run(layers), "aligned": lambda: run(others)}, clock)
    return times["aligned"] / times["ours"]


def _widened(layer: Any) -> Any:
    """Return the layer with kept counts of whole panels: itself where nothing is to round up."""
    plain = layer.unpack() if isinstance(layer, PackedLinear) else layer
    if not isinstance(plain, PrunedLinear):
        return layer
    n, k = plain.weight.shape
    wide = _round_up(n, plain.out_features), _round_up(k, plain.in_features)
    if wide == (n, k):
        return layer
    other = PrunedLinear(
        plain.in_features, plain.out_features, *wide, plain.bias is not None,
        dtype=plain.weight.dtype,
    ).requires_grad_(False)  # fmt: skip
    return PackedLinear(other, layer.weight_dtype) if isinstance(layer, PackedLinear) else other


def _round_up(count: int, full: int) -> int:
    return min(full, -(-count // _PANEL) * _PANEL)


def _median(
    calls: Mapping[str, Callable[[], Any]], clock: Clock, seconds: float = 0.05
) -> dict[str, float]:
    times = interleave(calls, seconds, sample=1e-4, max_rounds=60, clock=clock)
    return {name: statistics.median(series) for name, series in times.items()}
