"""`PackedLinear`: a Linear or `PrunedLinear` that keeps only what the CPU kernels read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import PrunedLinear
from ..ops import _cpu, packed_linear

WEIGHT_DTYPES = (None, "int8")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class PackedLinear(nn.Module):
    """y[..., rows] = act(x[..., columns] wᵀ + b), every other output exactly 0, for inference.

    Weight, bias and kept indices are in one uint8 buffer, ``packed``; there is no second copy. x is
    fp32, bf16 or fp16 whatever the weight's dtype, y has x's dtype, sums are fp32. The state dict
    is that of the layer it was made from, unpacked when asked for, and loads as such.

    Args:
        layer: a plain `nn.Linear` or `PrunedLinear` on the CPU, fp32, bf16 or fp16 (kept as fp32);
            it is not changed.
        weight_dtype: None for the layer's own, ``"int8"`` for symmetric int8 with one scale a row.
        shared: of ``"weight"`` and ``"bias"`` those that other modules hold too; the state dict has
            them instead of unpacked copies.

    Attributes:
        tied: whether a `PackedEmbedding` reads its rows here.

    Raises:
        TypeError: another class of layer.
        ValueError: another device, dtype or ``weight_dtype``.

    Example:
        >>> linear = nn.Linear(4, 3)
        >>> packed = PackedLinear(linear)
        >>> torch.equal(packed.unpack().weight, linear.weight)
        True
        >>> packed.train()
        Traceback (most recent call last):
        ...
        RuntimeError: a packed layer can't train; finegates.restore_(model) unpacks the model
    """

    packed: Tensor

    def __init__(
        self,
        layer: nn.Linear | PrunedLinear,
        weight_dtype: str | None = None,
        shared: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        super().__init__()
        check_weight_dtype(weight_dtype)
        reason = why_not(layer)
        if reason is not None:
            error = ValueError if type(layer) in (nn.Linear, PrunedLinear) else TypeError
            raise error(f"layer can't be packed: {reason}")
        self.weight_dtype = weight_dtype
        self.register_buffer("packed", None, persistent=False)
        self._shared = dict(shared or {})
        self.tied = False
        self.training = False
        self._pack(layer)

    @torch.no_grad()
    def _pack(self, layer: nn.Linear | PrunedLinear) -> None:
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.pruned = isinstance(layer, PrunedLinear)
        self.activation = layer.activation if isinstance(layer, PrunedLinear) else "none"
        self.dtype = layer.weight.dtype
        self._bias_dtype = None if layer.bias is None else layer.bias.dtype
        weight, scale = layer.weight.detach(), None
        if self.weight_dtype == "int8":
            weight, scale = _cpu.quantize_rows(weight)
        rows, columns = (
            (layer.rows, layer.columns) if isinstance(layer, PrunedLinear) else (None, None)
        )
        self.packed = _cpu.prepare(
            weight, layer.bias, rows, columns, self.out_features, self.in_features, scale
        )
        self._lent: weakref.ref[Tensor] | None = None

    def unpack(self) -> nn.Linear | PrunedLinear:
        """Return the layer this one was made from, bit for bit; int8 weights as q · scale.

        What isn't shared is new memory and requires no gradient. The weight that an embedding is
        tied to is one parameter for as long as somebody holds it.
        """
        weight, bias, rows, columns, scale = _cpu.unpack(self.packed)
        if scale is not None:
            weight = weight * scale[:, None]
        layer: nn.Linear | PrunedLinear
        if self.pruned:
            layer = PrunedLinear(
                self.in_features,
                self.out_features,
                None if rows is None else len(rows),
                None if columns is None else len(columns),
                bias is not None,
                self.activation,
                device="meta",
            )
            layer.rows, layer.columns = rows, columns
        else:
            layer = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        values = {"weight": weight.to(self.dtype), "bias": bias}
        if bias is not None:
            values["bias"] = bias.to(self._bias_dtype)
        for name, value in values.items():
            if value is not None:
                own = nn.Parameter(value, requires_grad=False)
                setattr(layer, name, self._shared.get(name, own))
        if self.tied:
            lent = None if self._lent is None else self._lent()
            if lent is None:
                self._lent = weakref.ref(layer.weight)
            else:
                layer.weight = lent
        return layer.eval()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a copy of this layer hasn't lent to anybody."""
        return {**self.__dict__, "_lent": None}

    @property
    def weight(self) -> Tensor:
        """The weight as the unpacked layer has it: a copy made at each access."""
        return self.unpack().weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """The bias as the unpacked layer has it: a copy made at each access."""
        bias = self.unpack().bias
        return None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to y [..., N].

        Raises:
            RuntimeError: a gradient is wanted, or `train` was called.
            ValueError, TypeError: x's last dimension, dtype or device doesn't fit.
        """
        if self.training:
            raise RuntimeError(
                "a packed layer can't train; call eval() or finegates.restore_(model)"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a packed layer has no gradient; call it under torch.no_grad()")
        return packed_linear(x, self.packed, self.out_features, self.activation)

    def train(self, mode: bool = True) -> PackedLinear:
        """Refuse: there is nothing here that an optimizer could change.

        A model's own `train` has put the modules before this one into training mode by then, so
        `forward` refuses too until ``eval()``.

        Raises:
            RuntimeError: ``mode`` is True.
        """
        super().train(mode)
        if mode:
            raise RuntimeError(
                "a packed layer can't train; finegates.restore_(model) unpacks the model"
            )
        return self

    def extra_repr(self) -> str:
        """Return sizes, kept counts and dtype for `repr`."""
        layout = _cpu.describe(self.packed)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"kept_rows={layout.n_rows}, kept_columns={layout.n_columns}, "
            f"bias={layout.has_bias}, dtype={layout.dtype}, activation={self.activation!r}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Follow `.half()` and the like by packing again; refuse to leave the CPU."""
        moved = fn(torch.empty(0, dtype=self.dtype))
        if moved.device.type != "cpu":
            raise ValueError(
                f"a packed layer stays on the CPU, got {moved.device}; finegates.restore_(model) "
                "unpacks the model"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if moved.dtype != self.dtype:
            if moved.dtype not in _FLOATS:
                raise ValueError(f"a packed layer can't be {moved.dtype}")
            self._pack(self.unpack()._apply(fn))
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        layer = self.unpack()
        layer._save_to_state_dict(destination, prefix, keep_vars)
        if self.tied:  # itself, not a detached alias: the embedding's entry has to be the same
            destination[prefix + "weight"] = layer.weight

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        layer = self.unpack()
        layer._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._pack(layer)


def why_not(layer: nn.Module) -> str | None:
    """Return why a layer can't become a `PackedLinear`, or None."""
    if type(layer) not in (nn.Linear, PrunedLinear):
        return f"{type(layer).__name__} is neither nn.Linear nor PrunedLinear"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has forward hooks"
    weight = layer.weight
    if not isinstance(weight, Tensor) or weight.device.type != "cpu":
        return f"its weight is on {weight.device}, not on the CPU"
    if weight.dtype not in _FLOATS:
        return f"its weight is {weight.dtype}, not float32, bfloat16 or float16"
    return None


def check_weight_dtype(weight_dtype: object) -> None:
    """Check what `optimize_for_cpu` and `PackedLinear` take.

    Raises:
        ValueError: it isn't one of `WEIGHT_DTYPES`.
    """
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight_dtype must be one of {WEIGHT_DTYPES}, got {weight_dtype!r}")
