"""Where a forward pass spends its time: seconds of the modules that matter, by hooks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..nn import PrunedLinear
from ..serving import PackedLinear
from ..serving.fused import FusedBlock

LINEARS = (nn.Linear, PrunedLinear, PackedLinear)


def part_of(module: nn.Module) -> str | None:
    """Return the part of a model that a module's own time belongs to, None for its caller's.

    ``"linear"``, ``"attention"`` (scores, rotary embedding and what its module does around them),
    ``"norm"``, ``"embedding"`` or ``"block"`` (a fused one), by class, else by the class's name.
    """
    if isinstance(module, LINEARS):
        return "linear"
    if isinstance(module, FusedBlock):
        return "block"
    name = type(module).__name__
    for word, part in (
        ("Norm", "norm"),
        ("Rotary", "attention"),
        ("Attention", "attention"),
        ("Embedding", "embedding"),
    ):
        if word in name:
            return part
    return None


@dataclass
class _Frame:
    """A module that is running: when it began, its timed children so far, all hooks within."""

    begin: float
    children: float = 0.0
    hooks: float = 0.0


class ModuleClock:
    """Times modules by forward hooks, and takes the hooks' own cost off.

    Args:
        model: its modules that `part_of` knows are timed.
        also: names of further modules.
        clock: seconds.

    Attributes:
        parts: per timed module its part; ``"rest"`` for those of ``also`` that have none.
        rows: per Linear the rows of its input in the last pass.
    """

    def __init__(
        self,
        model: nn.Module,
        also: Collection[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        found = {name: (m, part_of(m)) for name, m in model.named_modules()}
        self._modules = {n: m for n, (m, part) in found.items() if part or n in also}
        self.parts = {n: found[n][1] or "rest" for n in self._modules}
        self.rows: dict[str, int] = {}
        self._passes: list[dict[str, tuple[float, float]]] = []
        self._pass: dict[str, tuple[float, float]] = {}
        self._stack: list[_Frame] = []

    def run(self, call: Callable[[], Any]) -> Any:
        """Run a call with the hooks in place and keep what its modules took."""
        self._pass = {}
        with self._hooks():
            result = call()
        self._passes.append(self._pass)
        return result

    def exclusive(self) -> dict[str, float]:
        """Return each module's own seconds, children that are timed taken off; median over runs."""
        return self._medians(0)

    def inclusive(self) -> dict[str, float]:
        """Return each module's seconds with everything in it; median over runs."""
        return self._medians(1)

    def _medians(self, which: int) -> dict[str, float]:
        names = {name: None for seen in self._passes for name in seen}
        return {
            name: statistics.median(seen.get(name, (0.0, 0.0))[which] for seen in self._passes)
            for name in names
        }

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        inner, outer = hook_cost(self._clock)
        handles = []
        for name, module in self._modules.items():
            before, after = self._pair(name, isinstance(module, LINEARS), inner, outer)
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _pair(
        self, name: str, is_linear: bool, inner: float, outer: float
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        stack, clock = self._stack, self._clock

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if is_linear:
                self.rows[name] = args[0].numel() // max(1, args[0].shape[-1])
            stack.append(_Frame(clock()))

        def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            frame = stack.pop()
            taken = max(0.0, clock() - frame.begin - inner)
            own, whole = self._pass.get(name, (0.0, 0.0))
            own += max(0.0, taken - frame.children)
            whole += max(0.0, taken - frame.hooks)
            self._pass[name] = (own, whole)
            if stack:
                stack[-1].children += taken + inner + outer
                stack[-1].hooks += frame.hooks + inner + outer

        return before, after


def hook_cost(clock: Callable[[], float], rounds: int = 200) -> tuple[float, float]:
    """Return the seconds that a pair of hooks adds within its own measurement, and around it."""
    module = nn.Identity()
    plain = _median_call(module, clock, rounds)
    inside: list[float] = []
    begin = 0.0

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal begin
        begin = clock()

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        inside.append(clock() - begin)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
    hooked = _median_call(module, clock, rounds)
    inner = statistics.median(inside)
    return inner, max(0.0, hooked - plain - inner)


def _median_call(module: nn.Module, clock: Callable[[], float], rounds: int) -> float:
    x, times = torch.empty(0), []
    for _ in range(rounds):
        begin = clock()
        module(x)
        times.append(clock() - begin)
    return statistics.median(times)
