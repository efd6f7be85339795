"""Counting what closed gates remove, and shifting logits so that a budget is met exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    """Parameters of the gated weights, and how many of them are dead.

    Args:
        total: Σ N K over the gated layers.
        removed: of these, the ones in a dead row or column.
    """

    total: int
    removed: int

    @property
    def fraction(self) -> float:
        """removed / total."""
        return self.removed / self.total


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
        ValueError: the model has no gated layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, FusedGatedLinear)
        }
        if not self.layers:
            raise ValueError("model has no FusedGatedLinear; call gate_(model, config) first")
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
        alive = on_host(self.alive())
        total = kept = 0
        for name, layer in self.layers.items():
            total += layer.weight.numel()
            kept += int(alive[Side(name, "row")].sum()) * int(alive[Side(name, "column")].sum())
        return Removal(total, total - kept)

    @torch.no_grad()
    def project_(self, sparsity: float) -> Removal:
        """Shift all logits by one constant so that ``sparsity`` of the parameters is removed.

        The threshold is found by bisection over the sorted margins on the exact count: removal can
        only grow with the threshold, because couplings are minima and maxima of margins. It lies
        midway between two neighbouring margins; equal margins close together, but never all of a
        model. Infinite logits stay as they are.

        Args:
            sparsity: fraction of the gated weights' parameters, in [0, 1).

        Returns:
            What is removed now.

        Raises:
            ValueError: ``sparsity`` is outside [0, 1), or a logit is NaN.
        """
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity must be in [0, 1), got {sparsity!r}")
        margins = on_host(self.margins())
        layers = [
            (margins[Side(name, "row")].sort().values, margins[Side(name, "column")].sort().values)
            for name in self.layers
        ]
        total = sum(len(rows) * len(columns) for rows, columns in layers)
        every = torch.cat([margin for pair in layers for margin in pair])
        finite: Tensor = every[every.isfinite()].unique()  # type: ignore[no-untyped-call]
        if len(finite) == 0:
            return self.removal()
        edge = torch.tensor([torch.inf], dtype=finite.dtype)
        levels = torch.cat([-edge, finite, edge])

        def removed(at: int) -> int:
            """Parameters removed when the levels up to ``at`` are closed."""
            level, kept = levels[at], 0
            for rows, columns in layers:
                open_rows = len(rows) - int(torch.searchsorted(rows, level, right=True))
                open_columns = len(columns) - int(torch.searchsorted(columns, level, right=True))
                kept += open_rows * open_columns
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
        return self.removal()

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
