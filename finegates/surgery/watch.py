"""What a training log should tell about gates: dead starts, ratchets and collapses show there."""

from __future__ import annotations

import torch
from torch import Tensor

from .budget import GateMap


class GateWatch:
    """Figures of a gated model's training, cheap enough for every step.

    Args:
        gates: of the model; tied gates count once.
    """

    def __init__(self, gates: GateMap) -> None:
        self._map = gates
        self._gates = gates.gates()
        self._count = sum(gate.logits.numel() for gate in self._gates)
        self._reached: Tensor | None = None
        self._sides: Tensor | None = None

    def see_gradients(self) -> None:
        """Count the gates that the step's gradient reaches, before anything is added to it."""
        grads = [gate.logits.grad for gate in self._gates if gate.logits.grad is not None]
        # One concatenation, so that the launches don't grow with the layers.
        self._reached = torch.count_nonzero(torch.cat(grads)) if grads else torch.zeros(())

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Return the shares of now, and what changed since the last call.

        ``removed``: of what the budget counts; ``gates_with_gradient``: of the last step;
        ``gates_fractional``: strictly between 0 and 1 in evaluation; ``gates_changed_side``: open
        instead of closed or closed instead of open since the last call (from the second one on).
        """
        # Values per feature would count a tied unit once for each of its features.
        values = torch.cat([gate.unit_value() for gate in self._gates])
        sides, before = values > 0, self._sides
        self._sides = sides
        figures = {
            "removed": self._map.budgeted().fraction,
            "gates_fractional": float((sides & (values < 1)).float().mean()),
        }
        if self._reached is not None:
            figures["gates_with_gradient"] = float(self._reached) / self._count
        if before is not None:
            figures["gates_changed_side"] = float((sides != before).float().mean())
        return figures
