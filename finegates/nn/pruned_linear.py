"""`PrunedLinear`: what is left of a Linear after its closed rows and columns were removed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import pruned_linear
from ..ops.eager import EagerLinear
from ..ops.reference import ACTIVATIONS


class PrunedLinear(nn.Module):
    """y[..., rows] = act(x[..., columns] wᵀ + b), every other output exactly 0.

    State dict: ``weight`` [n, k] and ``bias`` [n] compact, ``rows`` int32 [n] and ``columns``
    int32 [k] only where something was removed. The CPU kernels' packed copy of the weight is made
    on first use and made again when the weight is replaced or written in place, and after a step of
    any optimizer (other writes through ``.data`` go unseen); it is not saved.

    The CPU kernels run on GNU OpenMP, whose threads don't survive a fork: the child of a process
    that has run them on several threads hangs. Start children by ``spawn``, or call
    ``torch.set_num_threads(1)`` before forking.

    Args:
        in_features, out_features: K and N, as the neighbours see them.
        kept_rows, kept_columns: n and k; None keeps the whole side, without an index buffer.
        bias, device, dtype: as for `nn.Linear`.
        activation: ``"none"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or ``"relu"``.

    Raises:
        ValueError: a size or a count isn't a whole number, a count is outside 0 … the side's size,
            or the activation is unknown. Loading a state dict with indices that are unsorted,
            duplicated or out of range raises it too.

    Example:
        >>> linear = nn.Linear(4, 3)
        >>> pruned = PrunedLinear.from_linear(linear, rows=torch.tensor([0, 2]))
        >>> pruned(torch.ones(1, 4))[0, 1].item()
        0.0
    """

    bias: nn.Parameter | None
    rows: Tensor | None
    columns: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kept_rows: int | None = None,
        kept_columns: int | None = None,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        k = _kept_count("kept_columns", kept_columns, _size("in_features", in_features))
        n = _kept_count("kept_rows", kept_rows, _size("out_features", out_features))
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
        self.in_features, self.out_features = in_features, out_features
        self.activation = activation
        self.backend = "auto"
        self.weight = nn.Parameter(torch.empty(n, k, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(n, device=device, dtype=dtype)) if bias else None
        )
        for name, kept in (("rows", kept_rows), ("columns", kept_columns)):
            index = None if kept is None else torch.arange(kept, dtype=torch.int32, device=device)
            self.register_buffer(name, index)
        self._eager = EagerLinear()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Linear` does."""
        bound = 1.0 / math.sqrt(max(1, self.weight.shape[1]))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        activation: str = "none",
    ) -> PrunedLinear:
        """Keep the given rows and columns of a Linear.

        Args:
            linear: the dense layer; it is not changed.
            rows, columns: sorted kept indices (integer, 1-D, no duplicates); None keeps all.
            activation: fused into the epilogue.

        Raises:
            TypeError: ``linear`` is not an `nn.Linear`.
            ValueError: indices are not 1-D, sorted, unique and in range.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.detach()
        if rows is not None:
            check_indices("rows", rows, linear.out_features)
            weight = weight[rows.long()]
            bias = None if bias is None else bias[rows.long()]
        if columns is not None:
            check_indices("columns", columns, linear.in_features)
            weight = weight[:, columns.long()]
        layer = cls(
            linear.in_features,
            linear.out_features,
            None if rows is None else len(rows),
            None if columns is None else len(columns),
            bias is not None,
            activation,
            device="meta",
            dtype=weight.dtype,
        )
        layer.weight = nn.Parameter(weight.clone(), requires_grad=linear.weight.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone(), requires_grad=linear.bias.requires_grad)
        layer.rows = None if rows is None else rows.to(weight.device, torch.int32)
        layer.columns = None if columns is None else columns.to(weight.device, torch.int32)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """Return the dense-shaped Linear, with zeros where rows and columns were removed.

        Raises:
            ValueError: the layer has an activation, which a Linear can't hold.
        """
        if self.activation != "none":
            raise ValueError(f"activation must be 'none' to be a Linear, got {self.activation!r}")
        weight = self.weight.detach()
        if self.columns is not None:
            wide = weight.new_zeros(weight.shape[0], self.in_features)
            weight = wide.index_copy(1, self.columns.long(), weight)
        bias = None if self.bias is None else self.bias.detach()
        if self.rows is not None:
            rows = self.rows.long()
            tall = weight.new_zeros(self.out_features, self.in_features)
            weight = tall.index_copy(0, rows, weight)
            if bias is not None:
                bias = bias.new_zeros(self.out_features).index_copy(0, rows, bias)
        linear = nn.Linear(
            self.in_features, self.out_features, bias is not None, device="meta"
        ).train(self.training)
        linear.weight = nn.Parameter(weight.clone(), self.weight.requires_grad)
        if self.bias is not None and bias is not None:
            linear.bias = nn.Parameter(bias.clone(), self.bias.requires_grad)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to y [..., N].

        Raises:
            ValueError: x's last dimension, dtype or device doesn't fit.
        """
        shape = x.shape
        if not shape or shape[-1] != self.in_features:
            raise ValueError(
                f"x must have a last dimension of {self.in_features}, got shape {tuple(x.shape)}"
            )
        if self.backend == "auto":
            # Reading the dicts instead of the attributes saves 2 µs of nn.Module.__getattr__.
            parameters, buffers = self._parameters, self._buffers
            try:
                w, b = parameters["weight"], parameters["bias"]
                rows, columns = buffers["rows"], buffers["columns"]
            except KeyError:  # parametrized: an attribute computes it
                pass
            else:
                y = self._eager.run(x, w, b, rows, columns, self.out_features, self.activation)  # type: ignore[arg-type]
                if y is not None:
                    return y
        return pruned_linear(
            x,
            self.weight,
            self.bias,
            self.rows,
            self.columns,
            self.out_features,
            activation=self.activation,
            backend=self.backend,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrunedLinear:
        """Let go of the pack when the weight moves: it keeps the old one alive."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._eager.forget(self.weight)
        return self

    def extra_repr(self) -> str:
        """Return sizes and kept counts for `repr`."""
        n, k = self.weight.shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"kept_rows={n}, kept_columns={k}, bias={self.bias is not None}, "
            f"activation={self.activation!r}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, size in (("rows", self.out_features), ("columns", self.in_features)):
            indices = state_dict.get(prefix + name)
            if indices is not None and getattr(self, name) is not None:
                check_indices(prefix + name, indices, size)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _size(name: str, size: int) -> int:
    if type(size) is not int or size < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, got {size!r}")
    return size


def _kept_count(name: str, kept: int | None, size: int) -> int:
    if kept is None:
        return size
    if _size(name, kept) > size:
        raise ValueError(f"{name} must be between 0 and {size}, got {kept}")
    return kept


def check_indices(name: str, indices: Tensor, size: int) -> None:
    """Check kept indices: integer, 1-D, strictly increasing, in [0, size).

    Raises:
        ValueError: naming the argument and the first offending value.
    """
    if not isinstance(indices, Tensor):
        raise ValueError(f"{name} must be a 1-D int32 or int64 tensor, got {indices!r}")
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be a 1-D int32 or int64 tensor, got {indices.dtype} with shape "
            f"{tuple(indices.shape)}"
        )
    out_of_range = indices[(indices < 0) | (indices >= size)]
    if len(out_of_range):
        raise ValueError(f"{name} must lie in [0, {size}), got {out_of_range[0].item()}")
    if len(indices) > 1:
        step = (indices[1:] - indices[:-1] <= 0).nonzero()
        if len(step):
            at = int(step[0]) + 1
            raise ValueError(
                f"{name} must be sorted without duplicates, got {indices[at].item()} after "
                f"{indices[at - 1].item()}"
            )
