"""The gate of one side of one Linear: logits → sample, evaluation value, open probability."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config import GateConfig
from .ops import reference

_LARGEST = torch.finfo(torch.float32).max


class Gate(nn.Module):
    """A vector of gates with fp32 logits θ, one value in [0, 1] per row or column.

    With ε ~ N(0, 1), u ~ U(0, 1) and the constants of `GateConfig`:

    - ranking: z = 1[θ > 0]; dz/dθ = 1 (straight-through), for open gates only unless
      ``closed_gradient``;
    - gaussian: z = clamp(tanh θ + offset + σ ε, 0, 1);
    - hard concrete: s = sigmoid((log u - log(1 - u) + θ) / β), z = clamp(s (ζ - γ) + γ, 0, 1).

    Each training forward draws one sample from a seed that comes from torch's own generator on the
    logits' device, so `torch.manual_seed` reproduces it and gradient checkpointing recomputes it.
    Logits stay fp32 whatever the model is cast to: bf16 loses updates below 0.004 near 1.

    Args:
        size: number of rows or columns.
        config: distribution and constants.
        layout: how units spread over the side, ``(groups, repeats, pairs, width)`` with product
            ``size``; the gate then has one logit per (group, width) that is shared over repeats
            (query heads of a group) and pairs (rotary halves). None: one logit per element.
        device: of the logits.
    """

    logits: nn.Parameter

    def __init__(
        self,
        size: int,
        config: GateConfig,
        layout: tuple[int, int, int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if layout is not None and math.prod(layout) != size:
            raise ValueError(f"layout must have product {size}, got {layout}")
        self.size = size
        self.config = config
        self.layout = layout
        units = size if layout is None else layout[0] * layout[3]
        self.logits = nn.Parameter(torch.empty(units, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the starting logits from N(start_logit, init_std²)."""
        nn.init.normal_(self.logits, self.config.start_logit, self.config.init_std)

    def forward(self, seed: Tensor | None = None) -> Tensor:
        """Return the gate values [size] in fp32: a sample in training, `value` in evaluation.

        Args:
            seed (`Tensor` int64 [1], *optional*): of the noise; None draws one.
        """
        if not self.training or self.config.distribution == "ranking":
            return self.value()
        if seed is None:
            seed = torch.randint(0, 2**31 - 1, (1,), device=self.logits.device)
        return self.spread(self._units(self.logits, seed))

    def value(self) -> Tensor:
        """Return the noise-free values [size] that evaluation uses and `prune_` folds."""
        return self.spread(self.unit_value())

    def open_probability(self) -> Tensor:
        """Return P(z > 0) per unit [units], differentiable in the logits.

        gaussian: Φ((tanh θ + offset) / σ₀); hard concrete: sigmoid(θ - β log(-γ / ζ)); ranking: the
        binary value itself.
        """
        config = self.config
        if config.distribution == "ranking":
            return self.unit_value()
        return reference.open_probability(self.logits, config.distribution, *config.open_constants)

    @property
    def span_width(self) -> tuple[int, int]:
        """The layout as the kernels take it: feature i has unit (i // span) width + i mod width."""
        if self.layout is None:
            return max(self.size, 1), max(self.size, 1)
        _, repeats, pairs, width = self.layout
        return repeats * pairs * width, width

    def spread(self, units: Tensor) -> Tensor:
        """Spread a per-unit vector [units] over the side [size]."""
        if self.layout is None:
            return units
        groups, repeats, pairs, width = self.layout
        spread = units.view(groups, 1, 1, width).expand(groups, repeats, pairs, width)
        return spread.reshape(self.size)

    def extra_repr(self) -> str:
        """Return size and distribution for `repr`."""
        return f"{self.size}, distribution={self.config.distribution!r}"

    def unit_value(self) -> Tensor:
        """Return the noise-free value of each unit [units]; `value` spreads it over the side."""
        if self.config.distribution != "ranking":
            return self._units(self.logits, None)
        value = self._units(self.logits.detach(), None)
        # Clamped, since inf - inf is NaN: an infinite logit is a gate fixed open or closed.
        finite = self.logits.clamp(-_LARGEST, _LARGEST)
        slope = finite - finite.detach()
        return value + (slope if self.config.closed_gradient else slope * value)

    def _units(self, logits: Tensor, seed: Tensor | None) -> Tensor:
        config = self.config
        return reference.unit_gate(logits, seed, config.distribution, *config.constants)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """Follow moves between devices, ignore casts: the logits keep every fp32 bit."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self
