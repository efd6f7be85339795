"""Counting what closed gates remove, and shifting logits so that a budget is met exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..gates import Gate
from ..nn import FusedGatedLinear
from .couplings import AXES, ORDER, PROBABILITY, Algebra, Architecture, Side, architecture_of


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
    return gate.logits.detach() - gate.config.closing_logit


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
        self.architecture: Architecture = architecture_of(model)
        self.linears: dict[str, nn.Linear] = dict(self.layers)
        for coupling in self.architecture.couplings:
            for side in coupling.sides:
                module = model.get_submodule(side.module)
                if isinstance(module, nn.Linear):
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
        if layer is None:
            return None
        return layer.row_gate if side.axis == "row" else layer.column_gate

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

    @torch.no_grad()
    def margins(self) -> dict[Side, Tensor]:
        """Return per side the logits above the closing logit, couplings resolved: alive iff > 0."""
        raw = {side: self._spread(side, _margin, torch.inf) for side in self.sides()}
        return self._resolve(raw, ORDER)

    def open_probabilities(self) -> dict[Side, Tensor]:
        """Return per side P(alive), couplings resolved, differentiable in the logits.

        Sides of a coupling that share one gate die together: their probability is that gate's own.
        """
        raw = {side: self._spread(side, Gate.open_probability, 1.0) for side in self.sides()}
        tied = {side for c in self.couplings if self._is_tied(c.sides) for side in c.sides}
        resolved = self._resolve(raw, PROBABILITY)
        return {side: raw[side] if side in tied else value for side, value in resolved.items()}

    def removal(self) -> Removal:
        """Count the parameters of the gated weights and those in dead rows and columns."""
        margins = self.margins()
        total = kept = 0
        for name, layer in self.layers.items():
            total += layer.weight.numel()
            rows = int((margins[Side(name, "row")] > 0).sum())
            kept += rows * int((margins[Side(name, "column")] > 0).sum())
        return Removal(total, total - kept)

    @torch.no_grad()
    def project_(self, sparsity: float) -> Removal:
        """Shift all logits by one constant so that ``sparsity`` of the parameters is removed.

        The threshold is found by bisection over the sorted margins on the exact count: removal can
        only grow with the threshold, because couplings are minima and maxima of margins. It lies
        midway between two neighbouring margins; equal margins close together.

        Args:
            sparsity: fraction of the gated weights' parameters, in [0, 1).

        Returns:
            What is removed now.
        """
        margins = {side: m.double().cpu().numpy() for side, m in self.margins().items()}
        layers = [
            (np.sort(margins[Side(name, "row")]), np.sort(margins[Side(name, "column")]))
            for name in self.layers
        ]
        total = sum(len(rows) * len(columns) for rows, columns in layers)
        levels = np.unique(np.concatenate([m[np.isfinite(m)] for pair in layers for m in pair]))

        def removed(count: int) -> int:
            """Parameters removed when the lowest ``count`` levels are closed."""
            if count == 0:
                return 0
            level = levels[count - 1]
            kept = 0
            for rows, columns in layers:
                open_rows = len(rows) - int(np.searchsorted(rows, level, side="right"))
                kept += open_rows * (len(columns) - int(np.searchsorted(columns, level, "right")))
            return total - kept

        low, high = 0, len(levels)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if removed(middle) <= sparsity * total else (low, middle)
        goal = sparsity * total
        count = min((low, high), key=lambda candidate: abs(removed(candidate) - goal))
        below = levels[count - 1] if count > 0 else levels[0] - 1.0
        above = levels[count] if count < len(levels) else levels[-1] + 1.0
        shift = float((below + above) / 2)
        for gate in self.gates():
            gate.logits.sub_(shift)
        return self.removal()

    def _is_tied(self, sides: tuple[Side, ...]) -> bool:
        gates = [self.gate(side) for side in sides]
        return all(gate is not None for gate in gates) and (
            len({id(gate.logits) for gate in gates if gate is not None}) == 1
        )

    def _spread(self, side: Side, of: Callable[[Gate], Tensor], ungated: float) -> Tensor:
        gate = self.gate(side)
        if gate is not None:
            return gate.spread(of(gate))
        linear = self.linears[side.module]
        size = linear.out_features if side.axis == "row" else linear.in_features
        return torch.full((size,), ungated, device=linear.weight.device)

    def _resolve(self, values: dict[Side, Tensor], algebra: Algebra) -> dict[Side, Tensor]:
        resolved = dict(values)
        for coupling in self.couplings:
            resolved.update(coupling.resolve(values, algebra))
        return resolved
