"""A pruned model against the runtimes of its dense-shaped twin: checked, then timed interleaved."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..export import dense_model
from ..nn import PrunedLinear
from ..serving import optimize_for_cpu
from .ceilings import reading
from .memory import Memory
from .runtimes import PEERS, Prepare, Runtime, torch_runtime
from .timing import interleave, machine, percentile, threads_set_to
from .work import Call, Work, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
# Relative RMS error against the fp32 reference, above which a runtime doesn't compute this model:
# several times what correct ones have on random models of 6 to 30 layers (docs/serving.md).
MOST_ERROR = {"fp32": 5e-3, "bf16": 6e-2, "int8": 2e-1}
# A peer may err twice as much: to leave out one that rounds more than we do would flatter us.
_PEER_FACTOR = 2
OURS = ("pruned", "optimized")
# Where runtimes have spinning threads of their own, they sleep by then.
_SETTLE = 0.003


@dataclass(frozen=True)
class Cell:
    """What all runtimes do in turn: a work with weights of a type on a number of threads."""

    dtype: str
    work: Work
    threads: int


@dataclass(frozen=True)
class Result:
    """What one runtime did in one cell, or why it isn't there.

    Args:
        runtime, cell: which.
        p50, p90, p99: milliseconds; None where it wasn't timed.
        tokens_per_second: at p50.
        rounds: how many calls were timed.
        error: relative RMS error of its logits against the fp32 reference.
        reason: why it wasn't timed.
        weight_bytes, bandwidth: of the optimised model's decode: the Linears' kept weights, which
            a call reads once, and bytes a second that as many cores read, measured right after.
    """

    runtime: str
    cell: Cell
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    tokens_per_second: float | None = None
    rounds: int = 0
    error: float | None = None
    reason: str | None = None
    weight_bytes: int | None = None
    bandwidth: float | None = None

    @property
    def share_of_bandwidth(self) -> float | None:
        """Seconds that reading the kept weights takes at the least, over p50."""
        if self.weight_bytes is None or self.bandwidth is None or self.p50 is None:
            return None
        return self.weight_bytes / self.bandwidth / (1e-3 * self.p50)


@dataclass(frozen=True)
class ModelBench:
    """Everything about one model.

    Args:
        model: what was timed, in words.
        removed: fraction of the dense model's parameters that the pruned one lacks.
        results, memory: see their classes.
        shape, sparsity: the name in `recipes.shapes.SHAPES` and the fraction of the gated weights
            that was removed; None for a model of the user's.
    """

    model: str
    removed: float
    results: Sequence[Result]
    memory: Sequence[Memory] = ()
    shape: str | None = None
    sparsity: float | None = None
    machine: Mapping[str, Any] = field(default_factory=machine)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "machine": dict(self.machine)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelBench:
        """Build it from `to_dict`'s output."""
        results = []
        for result in values["results"]:
            cell = {**result["cell"], "work": Work(**result["cell"]["work"])}
            results.append(Result(**{**result, "cell": Cell(**cell)}))
        memory = [Memory(**sizes) for sizes in values["memory"]]
        return cls(**{**values, "results": results, "memory": memory})

    def cells(self) -> dict[Cell, dict[str, Result]]:
        """Return the results by cell and runtime, in the order of measurement."""
        cells: dict[Cell, dict[str, Result]] = {}
        for result in self.results:
            cells.setdefault(result.cell, {})[result.runtime] = result
        return cells


@torch.inference_mode()
def bench_model(
    model: Any,
    works: Sequence[Work],
    *,
    dtypes: Sequence[str] = ("fp32", "bf16"),
    threads: Sequence[int] = (1,),
    peers: Sequence[str] | None = None,
    seconds: float = 5.0,
    progress: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Time a pruned model, plain and optimised, against the runtimes of its dense twin.

    All runtimes of a cell run in turn in this process. Before, each is held against the twin in
    fp32 with weights rounded to the cell's dtype; one that computes something else isn't timed.

    Args:
        model: a `PreTrainedModel`, pruned or not, not optimised; it is not changed.
        works: what to do; see `Work`.
        dtypes: of the weights: ``"fp32"``, ``"bf16"`` or ``"int8"`` (with bf16 activations).
        threads: thread counts.
        peers: names of `PEERS`; None takes all.
        seconds: time budget of a cell, checks and compilation apart; every runtime runs 5 rounds.
        progress: called with each result.

    Raises:
        ValueError: a dtype or a peer is unknown.
    """
    for argument, given, known in (
        ("peers", peers or (), tuple(peer.name for peer in PEERS)),
        ("dtypes", dtypes, tuple(DTYPES)),
    ):
        for name in given:
            if name not in known:
                raise ValueError(f"{argument} must be of {known}, got {name!r}")
    results = []
    for dtype in dtypes:
        with tempfile.TemporaryDirectory(prefix="finegates-bench-") as folder:
            contest = _Contest(model, works, dtype, peers, Path(folder))
            for work in works:
                for count in threads:
                    with threads_set_to(count):
                        for result in contest.run(Cell(dtype, work, count), seconds):
                            results.append(result)
                            progress(result)
    return results


class _Contest:
    """All runtimes of one model at one weight type."""

    def __init__(
        self,
        model: Any,
        works: Sequence[Work],
        dtype: str,
        peers: Sequence[str] | None,
        folder: Path,
    ) -> None:
        pruned = copy.deepcopy(model).to(DTYPES[dtype])
        self.dense = dense_model(pruned)
        exact = copy.deepcopy(self.dense).float()
        self.references = {work: serve(exact, work)().clone() for work in works}
        del exact
        optimized = copy.deepcopy(pruned)
        optimize_for_cpu(optimized, weight_dtype="int8" if dtype == "int8" else None)
        self.runtimes = [peer for peer in PEERS if peers is None or peer.name in peers]
        if dtype != "int8" and any(isinstance(m, PrunedLinear) for m in pruned.modules()):
            self.runtimes.append(torch_runtime("pruned", pruned))
        self.runtimes.append(torch_runtime("optimized", optimized))
        self.optimized = optimized
        self.folder = folder
        self.opened: dict[str, Prepare] = {}

    def run(self, cell: Cell, seconds: float) -> Iterator[Result]:
        """Check all, then time those that passed."""
        calls: dict[str, Call] = {}
        errors: dict[str, float] = {}
        for runtime in self.runtimes:
            reason = runtime.why_not(self.dense, cell.dtype, cell.work)
            if reason is not None:
                yield Result(runtime.name, cell, reason=reason)
                continue
            try:
                call = self._open(runtime, cell.dtype)(cell.work, cell.threads)
                error = _relative_error(call(), self.references[cell.work])
            except Exception as failure:  # one runtime's fault must not end the others' run
                reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
                yield Result(runtime.name, cell, reason=reason)
                continue
            most = MOST_ERROR[cell.dtype] * (1 if runtime.name in OURS else _PEER_FACTOR)
            if error > most or math.isnan(error):
                reason = f"wrong result, not timed: relative error {error:.1e}"
                yield Result(runtime.name, cell, error=error, reason=reason)
                continue
            calls[runtime.name], errors[runtime.name] = call, error
        times = interleave(calls, seconds, settle=_SETTLE if cell.threads > 1 else 0.0)
        for name, series in times.items():
            p50, p90, p99 = (1e3 * percentile(series, share) for share in (0.5, 0.9, 0.99))
            rate = 1e3 * cell.work.tokens / p50
            result = Result(name, cell, p50, p90, p99, rate, len(series), errors[name])
            if name == OURS[-1] and cell.work.kind == "decode":
                size, bandwidth = reading(self.optimized, cell.threads)
                result = replace(result, weight_bytes=size, bandwidth=bandwidth)
            yield result

    def _open(self, runtime: Runtime, dtype: str) -> Prepare:
        if runtime.name not in self.opened:
            self.opened[runtime.name] = runtime.open(self.dense, dtype, self.folder)
        return self.opened[runtime.name]


def _relative_error(got: Tensor, reference: Tensor) -> float:
    """Return the RMS of the error over that of the reference."""
    if got.shape != reference.shape:
        return math.inf
    return float((got.float() - reference).norm() / reference.norm())
