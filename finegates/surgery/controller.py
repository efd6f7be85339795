"""`GateController`: what happens to the gates around every optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..penalty import fraction_penalty, fraction_penalty_of_masses
from .budget import GateMap, Removal
from .couplings import Side
from .masses import layer_masses, own_means
from .shrink import expand_, shrink_
from .watch import GateWatch

# Above zero, so that the gate is open, and far below any squared gradient.
_NOTHING_SEEN = 1e-30


class GateController:
    """Runs the schedule of a gated model: importance, budget and penalty, one step at a time.

    With the ``"fraction"`` objective every step after the warm-up ends with one shift of all logits
    that closes exactly the target's share of the budget, so that the end of training has
    nothing left to harden. Before that shift:

    - ranking gates have been open during the warm-up, their logits holding the sum of their squared
      gradients (as the optimizer would see them: clipped), which the optimizer doesn't touch. When
      the warm-up ends the logits become the log root mean squared gradient, an importance whose
      differences survive any common shift;
    - stochastic gates get λ · ∂penalty/∂θ added to their logits' gradients. The penalty doesn't
      depend on data, so that it is added once per optimizer step, whatever the accumulation.

    With the authors' ``"per_axis"`` objective there is the penalty alone, and no shift.

    The last ``recovery`` of the steps leave the gates as they then evaluate: no noise, no gradient,
    no shift, while biases, head and LoRA adapt to them.

    All state lives in the logits and the step number: a checkpoint of the model holds it.

    Args:
        model: a model that `gate_` has gated.
        total_steps: number of optimizer steps of the whole run.

    Raises:
        ValueError: the model has no gated layer, or ``total_steps`` is below 1.

    Example:
        >>> from finegates import GateConfig, gate_
        >>> model = gate_(nn.Sequential(nn.Linear(4, 4)), GateConfig(modules=("*",)))
        >>> optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
        >>> controller = GateController(model, total_steps=4)
        >>> controller.start()
        >>> for step in range(4):
        ...     controller.begin_step(step)
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     controller.before_step(step)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     controller.after_step(step)
        >>> controller.finish().removed > 0
        True
    """

    def __init__(self, model: nn.Module, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        self.map = GateMap(model)
        self.config = next(iter(self.map.layers.values())).config
        self.total_steps = total_steps
        # Both constant in launches, however many layers there are.
        per_axis = self.config.objective == "per_axis"
        self._means = own_means(self.map) if per_axis else None
        self._masses = None if per_axis else layer_masses(self.map)
        self._total = sum(layer.weight.numel() for layer in self.map.layers.values())
        self._ranking = self.config.distribution == "ranking"
        self._warmup = max(1, round(self.config.warmup * total_steps))
        self._recovery = total_steps - round(self.config.recovery * total_steps)
        self.watch = GateWatch(self.map)
        self.hardened = 0.0

    @property
    def logits(self) -> list[Tensor]:
        """The distinct logits of the model, tied ones once."""
        return [gate.logits for gate in self.map.gates()]

    @torch.no_grad()
    def start(self) -> None:
        """Begin a fresh run; a resumed run must not call it."""
        if self._ranking:
            for logits in self.logits:
                logits.fill_(_NOTHING_SEEN)

    def at_target(self, steps: int) -> bool:
        """Return whether the schedule asks for all of ``sparsity`` once ``steps`` are done."""
        return self.config.target(steps / self.total_steps) >= self.config.sparsity

    def begin_step(self, step: int) -> None:
        """Choose what optimizer step ``step`` (from 0) computes with, before its first forward.

        With ``shrink_every`` the layers are shrunk to what is left, except that every
        ``shrink_every``-th step is dense where closed gates are to get a gradient.
        """
        fixed = step >= self._recovery
        for layer in self.map.layers.values():
            layer.fixed = fixed
        every = self.config.shrink_every
        if every and (step % every or not self.config.closed_gradient or fixed):
            shrink_(self.map)
        else:
            expand_(self.map)

    def before_step(self, step: int) -> None:
        """Work on the gates' gradients of optimizer step ``step`` (from 0), before it is taken."""
        self.watch.see_gradients()
        if step >= self._recovery:
            for logits in self.logits:
                logits.grad = None
        elif not self._ranking:
            self._add_penalty_gradient(self.config.target((step + 1) / self.total_steps))
        elif step < self._warmup:
            for logits in self.logits:
                if logits.grad is not None:
                    # A step that overflowed in fp16 is skipped by the scaler, and so here.
                    logits.data += torch.nan_to_num(logits.grad.square(), 0.0, 0.0, 0.0)
                    logits.grad = None

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Rank the units when the warm-up ends, and meet the step's budget from then on.

        Every ``reorder_every`` steps the layers put what is closed by then last.
        """
        budgeted = self.config.objective == "fraction" and step < self._recovery
        if budgeted and step >= self._warmup - 1:
            if self._ranking and step == self._warmup - 1:
                for logits in self.logits:
                    logits.copy_(0.5 * torch.log(logits / self._warmup))
            # The step before the recovery has the last word.
            last = step + 1 == self._recovery
            target = self.config.target((step + 1) / self.total_steps)
            self.map.project_(self.config.sparsity if last else target)
        every = self.config.reorder_every
        if every and (step + 1) % every == 0:
            for layer in self.map.layers.values():
                layer.reorder_()

    def finish(self) -> Removal:
        """Meet the final budget exactly, and return what of it is removed.

        With the per-axis objective nothing is shifted: that method removes what it removes. Nor is
        it after a recovery, which has trained with the gates as they are. ``hardened`` then tells
        what fraction was removed here and not before.
        """
        expand_(self.map)
        for layer in self.map.layers.values():
            layer.fixed = False
        before = self.map.budgeted()
        if self.config.objective != "fraction" or self._recovery < self.total_steps:
            return before
        after = self.map.project_(self.config.sparsity)
        self.hardened = after.fraction - before.fraction
        return after

    def penalty(self, target: float) -> Tensor:
        """Return the stochastic objective at ``target`` (before λ), differentiable."""
        if self._means is not None:
            return (self._means() - (1.0 - target)).abs().mean()
        if self._masses is not None:
            return fraction_penalty_of_masses(self._masses().view(-1, 2), self._total, target)
        alive = self.map.open_probabilities()
        names = list(self.map.layers)
        rows = [alive[Side(name, "row")] for name in names]
        columns = [alive[Side(name, "column")] for name in names]
        return fraction_penalty(rows, columns, target)

    def _add_penalty_gradient(self, target: float) -> None:
        logits = self.logits
        with torch.enable_grad():
            penalty = self.config.penalty_weight * self.penalty(target)
        held, added = [], []
        for parameter, gradient in zip(logits, torch.autograd.grad(penalty, logits), strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                held.append(parameter.grad)
                added.append(gradient)
        if held:
            torch._foreach_add_(held, added)
