"""Where a pruned model's time goes, layer by layer, against its dense-shaped twin."""

from __future__ import annotations

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
    """One Linear, the Linears of one stage of a fused stack, or a fused block with all of its.

    Args:
        name: of the module.
        m: rows of the input.
        shapes: N, K and what is kept of both, per Linear.
        seconds, dense_seconds: in the pruned model and in the dense twin, both in place.
        floors: seconds by name, see `finegates.report.why`.
        aligned: time with aligned counts over this one, where that was measured.
        linears: seconds of a block's Linears alone.
        reason: why it isn't faster.
    """

    name: str
    m: int
    shapes: Sequence[tuple[int, int, int, int]]
    seconds: float
    dense_seconds: float
    floors: Mapping[str, float]
    aligned: float | None
    linears: float | None
    reason: str

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
        layers: every Linear, or fused block.
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
        native: list[Tensor] = []

        def hooked() -> None:
            with _cpu_blocks.timed_stages() as found:
                ours.run(calls["model"])
            native.extend(found)

        every = {**calls, "dense, hooks": lambda: theirs.run(calls["dense"]), "hooks": hooked}
        times = interleave(every, 2 * seconds, max_rounds=60, clock=clock)
        whole = {name: statistics.median(times[name]) for name in calls}
        stages = _stages(model, ours, native)
        ceilings = _ceilings(model, threads, clock)
        layers = _layers(model, dense, ours, theirs, stages, ceilings, clock)
    return ModelProfile(
        name or type(model).__name__,
        work,
        str(model.dtype).removeprefix("torch."),
        threads,
        whole["model"],
        whole["dense"],
        _parts(ours, layers, stages),
        _parts(theirs, (), ()),
        layers,
        ceilings,
    )


@dataclass(frozen=True)
class _Stage:
    """Seconds of one stage of a fused stack's native call, and the Linears it runs."""

    block: str
    part: str
    linears: tuple[str, ...]
    seconds: float


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


def _parts(
    clock: ModuleClock, layers: Sequence[LayerProfile], stages: Sequence[_Stage]
) -> dict[str, float]:
    """Sum up the modules by part; a fused block's time beyond its Linears is its attention's.

    A block that took its own forward isn't among the layers: its Linears are. A stack that timed
    its stages says itself what is whose.
    """
    parts = {"linear": 0.0, **dict.fromkeys(REASONS, 0.0)}
    alone = {layer.name: layer.linears or 0.0 for layer in layers}
    staged: dict[str, float] = {}
    for stage in stages:
        parts[stage.part] += stage.seconds
        staged[stage.block] = staged.get(stage.block, 0.0) + stage.seconds
    for name, seconds in clock.exclusive().items():
        part = clock.parts[name]
        if part == "block" and name in alone:
            linear = min(seconds, alone[name])
            parts["linear"] += linear
            part, seconds = "attention", seconds - linear
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

    def floors(inner: Sequence[str], m: int, call: float) -> dict[str, float]:
        kept = sum(n * k for _, _, n, k in shapes(inner))
        size = sum(weight_bytes(model.get_submodule(n)) for n in inner)
        return {
            "overhead": call,
            "bandwidth": size / ceilings["bytes"],
            "compute": 2 * m * kept / ceilings["flops"],
        }

    layers = []
    for stage in stages:
        inner = stage.linears
        if not inner:
            continue
        m = rows(stage.block, inner)
        limits = floors(inner, m, 0.0)  # one call for the whole stack
        reason = why_not_faster(stage.seconds, limits)
        name = inner[0] + "".join(f", {n.rpartition('.')[2]}" for n in inner[1:])
        whole = sum(dense_seconds[n] for n in inner)
        layers.append(
            LayerProfile(name, m, shapes(inner), stage.seconds, whole, limits, None, None, reason)
        )
    staged = {stage.block for stage in stages}
    for name, part in ours.parts.items():
        if part not in ("linear", "block") or name not in seconds or name in staged:
            continue
        module = model.get_submodule(name)
        inner = tuple(n for n, m in module.named_modules(prefix=name) if isinstance(m, LINEARS))
        if part == "block" and any(n in seconds for n in inner):
            continue
        m = rows(name, inner)
        limits = floors(inner, m, ceilings["call"])
        alone = aligned = None
        if part == "block":
            alone = sum(_alone(model.get_submodule(n), m, clock) for n in inner)
        elif max(limits.values()) < EXPLAINED * seconds[name]:
            aligned = _aligned(module, m, clock)
        reason = why_not_faster(seconds[name], limits, aligned, alone)
        layers.append(
            LayerProfile(
                name,
                m,
                shapes(inner),
                seconds[name],
                dense_seconds[name],
                limits,
                aligned,
                alone,
                reason,
            )
        )
    return layers


def _shape(layer: Any, dense: Any) -> tuple[int, int, int, int]:
    rows, columns = dense.weight.shape
    if isinstance(layer, PackedLinear):
        layout = _cpu.describe(layer.packed)
        return rows, columns, layout.n_rows, layout.n_columns
    n, k = layer.weight.shape
    return rows, columns, n, k


def _alone(layer: Any, m: int, clock: Clock) -> float:
    """Return what a layer takes by itself, on random rows."""
    x = torch.randn(m, layer.in_features, dtype=layer.dtype)
    return _median({"": lambda: layer(x)}, clock)[""]


def _aligned(layer: Any, m: int, clock: Clock) -> float | None:
    """Return the layer's time with kept counts of whole panels over its own, None where they are.

    Both run by themselves, in turn.
    """
    if not isinstance(layer, (PrunedLinear, PackedLinear)):
        return None
    plain = layer if isinstance(layer, PrunedLinear) else layer.unpack()
    if not isinstance(plain, PrunedLinear):
        return None
    n, k = plain.weight.shape
    wide = _round_up(n, plain.out_features), _round_up(k, plain.in_features)
    if wide == (n, k):
        return None
    dtype = plain.weight.dtype
    other = PrunedLinear(
        plain.in_features, plain.out_features, *wide, plain.bias is not None, dtype=dtype
    ).requires_grad_(False)
    x = torch.randn(m, plain.in_features, dtype=dtype)
    times = _median({"ours": lambda: layer(x), "aligned": lambda: other(x)}, clock)
    return times["aligned"] / times["ours"]


def _round_up(count: int, full: int) -> int:
    return min(full, -(-count // _PANEL) * _PANEL)


def _median(
    calls: Mapping[str, Callable[[], Any]], clock: Clock, seconds: float = 0.05
) -> dict[str, float]:
    times = interleave(calls, seconds, sample=1e-4, max_rounds=60, clock=clock)
    return {name: statistics.median(series) for name, series in times.items()}
