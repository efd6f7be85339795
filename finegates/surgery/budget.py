"""Counting what closed gates remove, and shifting logits so that a budget is met exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import GateConfig
from ..gates import Gate
from ..nn import FusedGatedLinear, Held
from .couplings import (
    AXES,
    ORDER,
    PROBABILITY,
    Algebra,
    Architecture,
    Coupling,
    Side,
    architecture_of,
)


@dataclass(frozen=True)
class Removal:
    """What the gated layers hold or take, and how much of it is in dead rows and columns.

    Args:
        total: Σ N K over the gated layers, or their seconds.
        removed: of these, what dead rows and columns save.
    """

    total: float
    removed: float

    @property
    def fraction(self) -> float:
        """removed / total."""
        return self.removed / self.total


# Of a Linear of shape (N, K) with so many rows and columns kept.
Price = Callable[[tuple[int, int], int, int], float]


def _parameters(shape: tuple[int, int], rows: int, columns: int) -> int:
    return rows * columns


def price_of(config: GateConfig) -> Price:
    """Return how the budget counts a layer.

    Raises:
        ValueError: it counts latency and there are no costs.
    """
    if config.budget == "parameters":
        return _parameters
    if config.costs is None:
        raise ValueError(
            "budget 'latency' needs costs, got None; finegates.report.measure_costs takes them"
        )
    return config.costs.seconds


def _margin(gate: Gate) -> Tensor:
    return gate.spread(gate.logits.detach() - gate.config.closing_logit)


def _probability(gate: Gate) -> Tensor:
    return gate.spread(gate.open_probability())


class GateMap:
    """The gated layers of a model with their couplings, resolved together.

    Built once from the model's structure; it reads the current logits at every call.

    Args:
        model: a model that `gate_` has gated.

    Raises:
        ValueError: the model has no gated layer, or its budget counts latency without costs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, FusedGatedLinear)
        }
        if not self.layers:
            raise ValueError("model has no FusedGatedLinear; call gate_(model, config) first")
        self.price = price_of(next(iter(self.layers.values())).config)
        # What `shrink_` kept last of a side: the mask on the host, and what a layer gets for it.
        self.kept: dict[Side, tuple[Tensor, Held]] = {}
        self.architecture: Architecture = architecture_of(model)
        self.linears: dict[str, nn.Linear] = dict(self.layers)
        for coupling in self.architecture.couplings:
            for side in coupling.sides:
                module = model.get_submodule(side.module)
                # Not a subclass: its forward may be anything.
                if type(module) is nn.Linear:
                    self.linears[side.module] = module
        self.couplings = [
            coupling
            for coupling in self.architecture.couplings
            if all(side.module in self.linears for side in coupling.sides)
            and any(side.module in self.layers for side in coupling.sides)
        ]

    def gate(self, side: Side) -> Gate | None:
        """Return the gate of a side, None when the side has none."""
        layer = self.layers.get(side.module)
        return None if layer is None else layer.gate(side.axis)

    def gates(self) -> list[Gate]:
        """Return the gates with distinct logits: tied gates count once."""
        unique: dict[int, Gate] = {}
        for name in self.layers:
            for axis in AXES:
                gate = self.gate(Side(name, axis))
                if gate is not None:
                    unique.setdefault(id(gate.logits), gate)
        return list(unique.values())

    def sides(self) -> list[Side]:
        """Return the row and column side of every Linear that takes part."""
        return [Side(name, axis) for name in self.linears for axis in AXES]

    def deciding(self) -> dict[Side, Gate | None]:
        """Return per side the gate that decides it: its own, or that of its tied coupling."""
        gates = {side: self.gate(side) for side in self.sides()}
        for coupling in self.couplings:
            if self.is_tied(coupling):
                gate = next(gates[side] for side in coupling.sides if gates[side] is not None)
                gates.update(dict.fromkeys(coupling.sides, gate))
        return gates

    @torch.no_grad()
    def margins(self) -> dict[Side, Tensor]:
        """Return per side the logits minus the closing logit, couplings resolved: the ranking.

        Raises:
            ValueError: a logit is NaN.
        """
        raw = {side: self._spread(side, _margin, torch.inf) for side in self.sides()}
        return self._resolve(_without_nan(raw), ORDER)

    @torch.no_grad()
    def alive(self) -> dict[Side, Tensor]:
        """Return per side which elements live (bool), couplings resolved.

        A gate is open when its evaluation value is above 0. That value decides, not the logit's
        distance to the closing logit: the two disagree within a rounding of the edge.

        Raises:
            ValueError: a logit is NaN.
        """
        raw = {side: self._spread(side, Gate.value, 1.0) for side in self.sides()}
        resolved = self._resolve(_without_nan(raw), ORDER)
        return {side: value > 0 for side, value in resolved.items()}

    def open_probabilities(self) -> dict[Side, Tensor]:
        """Return per side P(alive), couplings resolved, differentiable in the logits.

        Sides of a coupling that share one gate die together: their probability is that gate's own,
        and the side's that has none. Other gates are taken as independent.
        """
        resolved = {side: self._spread(side, _probability, 1.0) for side in self.sides()}
        for coupling in self.couplings:
            algebra = ORDER if self.is_tied(coupling) else PROBABILITY
            resolved.update(coupling.resolve(resolved, algebra))
        return resolved

    def removal(self) -> Removal:
        """Count the parameters of the gated weights and those in dead rows and columns."""
        return self._count(_parameters)

    def budgeted(self) -> Removal:
        """Count what the budget counts: `removal`, or the seconds of ``costs``."""
        return self._count(self.price)

    def _count(self, price: Price) -> Removal:
        alive = on_host(self.alive())
        total: float = 0
        kept: float = 0
        for name, shape in self._shapes().items():
            total += price(shape, *shape)
            rows, columns = (int(alive[Side(name, axis)].sum()) for axis in AXES)
            kept += price(shape, rows, columns)
        return Removal(total, total - kept)

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {name: (m.out_features, m.in_features) for name, m in self.layers.items()}

    @torch.no_grad()
    def project_(self, sparsity: float) -> Removal:
        """Shift all logits by one constant so that ``sparsity`` of the budget is removed.

        The threshold is found by bisection over the sorted margins on the exact count: removal can
        only grow with the threshold, because couplings are minima and maxima of margins. It lies
        midway between two neighbouring margins; equal margins close together, but never all of a
        model. Infinite logits stay as they are.

        Args:
            sparsity: fraction of the gated weights' parameters, or of their latency, in [0, 1).

        Returns:
            What of the budget is removed now.

        Raises:
            ValueError: ``sparsity`` is outside [0, 1), or a logit is NaN.
        """
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity must be in [0, 1), got {sparsity!r}")
        margins = on_host(self.margins())
        layers = [
            (
                shape,
                margins[Side(name, "row")].sort().values,
                margins[Side(name, "column")].sort().values,
            )
            for name, shape in self._shapes().items()
        ]
        total = sum(self.price(shape, *shape) for shape, _, _ in layers)
        every = torch.cat([margin for _, *pair in layers for margin in pair])
        finite: Tensor = every[every.isfinite()].unique()  # type: ignore[no-untyped-call]
        if len(finite) == 0:
            return self.budgeted()
        edge = torch.tensor([torch.inf], dtype=finite.dtype)
        levels = torch.cat([-edge, finite, edge])

        def removed(at: int) -> float:
            """What is removed when the levels up to ``at`` are closed."""
            level = levels[at]
            kept: float = 0
            for shape, rows, columns in layers:
                open_rows = len(rows) - int(torch.searchsorted(rows, level, right=True))
                open_columns = len(columns) - int(torch.searchsorted(columns, level, right=True))
                kept += self.price(shape, open_rows, open_columns)
            return total - kept

        goal = sparsity * total
        low, high = 0, len(finite)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if removed(middle) <= goal else (low, middle)
        nearer = abs(removed(high) - goal) < abs(removed(low) - goal)
        at = high if nearer and removed(high) < total else low
        shift = _between(*levels[at : at + 2].tolist())
        for gate in self.gates():
            gate.logits.sub_(shift)
        return self.budgeted()

    def is_tied(self, coupling: Coupling) -> bool:
        """Return whether one gate alone decides the coupling's units."""
        gates = [(side, self.gate(side)) for side in coupling.sides]
        present = [(side, gate) for side, gate in gates if gate is not None]
        return len({id(gate.logits) for _, gate in present}) == 1 and all(
            gate.layout == coupling.layout(side) for side, gate in present
        )

    def _spread(self, side: Side, of: Callable[[Gate], Tensor], ungated: float) -> Tensor:
        gate = self.gate(side)
        if gate is not None:
            return of(gate)
        linear = self.linears[side.module]
        size = linear.out_features if side.axis == "row" else linear.in_features
        return torch.full((size,), ungated, device=linear.weight.device)

    def _resolve(self, values: dict[Side, Tensor], algebra: Algebra) -> dict[Side, Tensor]:
        resolved = dict(values)
        for coupling in self.couplings:
            resolved.update(coupling.resolve(values, algebra))
        return resolved


def on_host(values: dict[Side, Tensor]) -> dict[Side, Tensor]:
    """Return CPU copies of vectors of one dtype: one wait for each GPU, however many sides."""
    copies: dict[Side, Tensor] = {}
    for device in {value.device for value in values.values()}:
        here = {side: value for side, value in values.items() if value.device == device}
        flat = torch.cat(list(here.values())).cpu()
        parts = torch.split(flat, [len(value) for value in here.values()])
        copies.update(zip(here, parts, strict=True))
    return copies


def _without_nan(values: dict[Side, Tensor]) -> dict[Side, Tensor]:
    found = {side: value.isnan().any().view(1) for side, value in values.items()}
    for side, has_nan in on_host(found).items():
        if has_nan:
            raise ValueError(f"{side.module}.{side.axis}_gate.logits holds NaN")
    return values


def _between(below: float, above: float) -> float:
    """Return an fp32 threshold t with below - t <= 0 < above - t in fp32."""
    # At the ends a distance of 1, or what fp32 can still tell apart at this size.
    if not math.isfinite(below):
        below = above - max(1.0, 2.0**-20 * abs(above))
    if not math.isfinite(above):
        above = below + max(1.0, 2.0**-20 * abs(below))
    middle = _fp32((below + above) / 2)
    return middle if middle < above else _fp32(below)


def _fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
