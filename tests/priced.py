"""A table of costs for any model, by a formula: nothing here is measured."""

from __future__ import annotations

from torch import nn

from finegates import GateConfig
from finegates.cost_table import CostTable, LinearCosts


def costs_of(model: nn.Module) -> CostTable:
    """Return costs of every Linear of a model at eighths of its sides.

    A column costs more than its share and a layer something whatever is left of it, so that a
    budget of seconds isn't one of parameters.
    """
    shapes = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)}
    linears = []
    for n, k in sorted(shapes):
        rows, columns = (sorted({-(-size * part // 8) for part in range(1, 9)}) for size in (n, k))
        seconds = [[1e-6 * (n + 0.3 * i * j + 2 * j * k**0.5) for j in columns] for i in rows]
        linears.append(LinearCosts(tuple(rows), tuple(columns), tuple(map(tuple, seconds))))
    return CostTable(tokens=7, threads=1, linears=tuple(linears))


def by_latency(model: nn.Module, **changes: object) -> GateConfig:
    """Return a config that counts a plain model's budget by `costs_of`."""
    return GateConfig(budget="latency", costs=costs_of(model), **changes)  # type: ignore[arg-type]
