"""Argument checks of the public ops; each raises a ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

_innermost_transform = torch._C._functorch.peek_interpreter_stack


def autocasts(x: Tensor) -> bool:
    """Return whether autocast casts x; as for ``F.linear``, it leaves fp64 alone."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def transformed() -> bool:
    """Return whether a transform runs for which the ops have no rule, so that the reference must.

    torch.compile traces transforms on its own terms.
    """
    return not torch.compiler.is_compiling() and transforms_run()


def transforms_run() -> bool:
    """Return whether torch.func or forward-mode AD is running.

    Neither has a public reader, but for ``unpack_dual`` per tensor at 0.4 µs.
    """
    return forward_ad._current_level >= 0 or _innermost_transform() is not None


def wants_gradient(*operands: Tensor | None) -> bool:
    """Return whether grad mode is on and an operand requires a gradient."""
    if torch.is_grad_enabled():
        for t in operands:  # a generator expression would cost 0.2 µs more
            if t is not None and t.requires_grad:
                return True
    return False


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Check an argument that has a few values."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_device(x: Tensor, **operands: Tensor | Sequence[Tensor] | None) -> None:
    """Check that operands, by their names, are on x's device."""
    for name, operand in operands.items():
        for tensor in (operand,) if isinstance(operand, Tensor) else operand or ():
            if tensor.device != x.device:
                raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def check_residual(residual: Tensor | None, x: Tensor, out_features: int) -> None:
    """Check what is added to a result [..., N] of x [..., K]."""
    if residual is None:
        return
    shape = (*x.shape[:-1], out_features)
    if residual.shape != shape:
        raise ValueError(f"residual must have shape {shape}, got {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        raise ValueError(f"residual must have x's dtype {x.dtype}, got {residual.dtype}")
    check_device(x, residual=residual)


def check_matrix(x: Tensor, w: Tensor, every_column: bool = True) -> None:
    """Check that w is a matrix that x [..., K] can meet, on one device."""
    if w.dim() != 2:
        raise ValueError(f"w must have 2 dimensions, got shape {tuple(w.shape)}")
    if x.dim() == 0 or every_column and x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"x must have a last dimension of {w.shape[1]}, got shape {tuple(x.shape)}"
        )
    if x.device != w.device:
        raise ValueError(f"x must be on w's device {w.device}, got {x.device}")


def check_vector(name: str, vector: Tensor, w: Tensor, side: int) -> None:
    """Check a vector of w's rows (side 0) or columns (side 1)."""
    if vector.shape != (w.shape[side],):
        raise ValueError(f"{name} must have shape ({w.shape[side]},), got {tuple(vector.shape)}")
    if vector.device != w.device:
        raise ValueError(f"{name} must be on w's device {w.device}, got {vector.device}")


def check_dtype(name: str, tensor: Tensor, w: Tensor) -> None:
    """Check a tensor against w's dtype."""
    if tensor.dtype != w.dtype:
        raise ValueError(f"{name} must have w's dtype {w.dtype}, got {tensor.dtype}")
