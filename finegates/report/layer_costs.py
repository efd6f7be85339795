"""Measure what Linears cost with fewer rows and columns, for a budget that counts latency."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..config import GateConfig
from ..cost_table import CostTable, LinearCosts
from ..nn import PrunedLinear
from ..surgery import architecture_of
from ..surgery.gate import select
from ._files import replacing
from .timing import interleave, threads_set_to

# Kept sizes that are measured, as eighths of a side.
_PARTS = 8


def measure_costs(
    model: nn.Module,
    config: GateConfig,
    tokens: int = 128,
    threads: int | None = None,
    *,
    seconds: float = 0.02,
) -> CostTable:
    """Time a `PrunedLinear` of every gated shape on the CPU, at about eighths of its sides.

    Medians; noise is evened out so that time never falls with size (the mean of the running
    maximum from below and the running minimum from above).

    Args:
        model: a plain model, before `gate_`; the Linears are those that ``config`` would gate.
        tokens: rows of the input.
        threads: None takes torch's current number.
        seconds: to spend on each size, five runs at least.

    Raises:
        ValueError: as `gate_` does, or a number is below 1.
    """
    threads = torch.get_num_threads() if threads is None else threads
    for name, value in (("tokens", tokens), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    linears: dict[tuple[int, int], nn.Linear] = {}
    for name in select(model, config, architecture_of(model)):
        linear: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
        linears.setdefault((linear.out_features, linear.in_features), linear)
    with threads_set_to(threads), torch.random.fork_rng(devices=[]):
        measured = tuple(_measure(linear, tokens, seconds) for linear in linears.values())
    return CostTable(tokens, threads, measured)


def write_costs(path: str | os.PathLike[str], costs: CostTable) -> None:
    """Write a table as JSON; an interrupted write leaves no half of it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(costs.to_dict(), indent=1) + "\n", encoding="utf-8")


def _measure(linear: nn.Linear, tokens: int, seconds: float) -> LinearCosts:
    dense = nn.Linear(
        linear.in_features, linear.out_features, linear.bias is not None, dtype=linear.weight.dtype
    )
    x = torch.randn(tokens, linear.in_features, dtype=linear.weight.dtype)
    rows, columns = _sizes(linear.out_features), _sizes(linear.in_features)
    taken = torch.tensor([_seconds(dense, x, n, columns, seconds) for n in rows])
    for axis in (0, 1):
        from_above = taken.flip(axis).cummin(axis).values.flip(axis)
        taken = (taken.cummax(axis).values + from_above) / 2
    return LinearCosts(rows, columns, tuple(map(tuple, taken.tolist())))


def _sizes(full: int) -> tuple[int, ...]:
    # One less than the eighths: a ranking seldom keeps a number that fills the kernel's panels.
    parts = {max(1, full * part // _PARTS - 1) for part in range(1, _PARTS)}
    return tuple(sorted({*parts, full}))


def _seconds(
    dense: nn.Linear, x: Tensor, rows: int, columns: Sequence[int], seconds: float
) -> list[float]:
    """Return the medians at one number of rows; more layers at a time would fill the memory."""
    kept_rows = _spread(rows, dense.out_features)
    calls = {}
    for k in columns:
        layer = PrunedLinear.from_linear(dense, kept_rows, _spread(k, dense.in_features))
        calls[str(k)] = partial(layer, x)
    # Parameters made in inference mode would be packed anew at every call.
    with torch.inference_mode():
        times = interleave(calls, seconds * len(calls), sample=seconds / 20)
    return [statistics.median(times[str(k)]) for k in columns]


def _spread(kept: int, full: int) -> Tensor | None:
    """Return evenly spread indices, None for all."""
    return None if kept == full else torch.arange(kept) * full // kept
