"""Ops on packed layers, pruned or dense: one uint8 tensor holds weight, bias and kept indices.

`pack` makes it. After that a server needs no other copy of the weight; `unpack` gives it back. The
ops run on the CPU and take no gradient to what is packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import register_fake

from .. import _native
from . import _cpu, dispatch, eager, reference
from ._cpu import unpack
from .checks import autocasts, check_choice, check_residual, transformed, wants_gradient
from .reference import ACTIVATIONS
from .schema import _library as library
from .schema import ops

__all__ = ["pack", "packed_embedding", "packed_glu", "packed_linear", "packed_linears", "unpack"]

_IDS = (torch.int32, torch.int64)

library.define(
    "packed_linear(Tensor x, Tensor packed, SymInt out_features, str activation, Tensor? residual)"
    " -> Tensor"
)
library.define(
    "packed_embedding(Tensor ids, Tensor packed, SymInt features, ScalarType dtype) -> Tensor"
)
library.define("packed_linears(Tensor x, Tensor[] packed, SymInt[] out_features) -> Tensor[]")
library.define(
    "packed_glu(Tensor x, Tensor gate, Tensor up, SymInt out_features, str activation) -> Tensor"
)


def pack(
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    out_features: int | None = None,
    in_features: int | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Pack a compact or dense weight [n, k] with what belongs to it for the ops of this module.

    int8 is symmetric with one scale a row, ``weight ≈ q * scale[:, None]``, error ≤ scale / 2; it
    halves what a decoding step reads of a bf16 weight.

    Args:
        weight (`Tensor` [n, k]): float32, bfloat16 or float16, on the CPU; it is not changed.
        bias (`Tensor` [n], *optional*): any float dtype, kept as float32.
        rows (`Tensor` int32 [n], *optional*): sorted kept output features, None for all.
        columns (`Tensor` int32 [k], *optional*): sorted kept input features, None for all.
        out_features, in_features: N and K, default to n and k.
        dtype: ``torch.float32``, ``torch.bfloat16`` or ``torch.int8``; None keeps the weight's,
            float32 for float16.

    Returns:
        `Tensor` uint8 [bytes]: plain; it may be copied, moved and saved.

    Raises:
        ValueError: a shape, a dtype or an index doesn't fit, a weight to become int8 has a NaN or
            an Inf, or there is no native extension.
        MemoryError: there is no room.

    Example:
        >>> packed = pack(torch.eye(3), rows=torch.tensor([0, 2, 3]), out_features=4)
        >>> packed_linear(torch.tensor([[1.0, 2.0, 3.0]]), packed, 4).tolist()
        [[1.0, 0.0, 2.0, 3.0]]
    """
    if not _native.available():
        raise ValueError(f"weight can't be packed: {_native.reason()}")
    if not weight.is_floating_point():
        raise ValueError(f"weight must be a float tensor, got {weight.dtype}")
    if dtype is not None:
        check_choice("dtype", dtype, (torch.float32, torch.bfloat16, torch.int8))
    scale = None
    if dtype is torch.int8:
        weight, scale = _cpu.quantize_rows(weight)
    elif dtype is not None:
        weight = weight.to(dtype)
    return _cpu.prepare(weight, bias, rows, columns, out_features, in_features, scale)


def packed_embedding(ids: Tensor, packed: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """Return the rows w[ids] of a packed layer's weight, as ``F.embedding`` does of a matrix.

    For an input embedding tied to an output layer: the packed layer is the only copy of both.

    Args:
        ids (`Tensor` int32 or int64 [...]): row numbers, on the CPU.
        packed (`Tensor` uint8 [bytes]): from `pack`, with every row and column kept.
        features: K.
        dtype: of the result.

    Returns:
        `Tensor` [..., K]; of an int8 weight q · scale.

    Raises:
        IndexError: an id is no row.
        ValueError: ids are no integers or elsewhere, or ``packed`` isn't such a layer.

    Example:
        >>> packed_embedding(torch.tensor([2]), pack(torch.eye(3)), 3, torch.float32).tolist()
        [[0.0, 0.0, 1.0]]
    """
    if ids.dtype not in _IDS:
        raise ValueError(f"ids must be int32 or int64, got {ids.dtype}")
    if packed.device != ids.device:
        raise ValueError(f"ids must be on packed's device {packed.device}, got {ids.device}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a float type, got {dtype}")
    if eager.is_plain(ids, _IDS):
        return _cpu.embedding(ids, packed, features, dtype)
    y: Tensor = ops.packed_embedding.default(ids, packed, features, dtype)
    return y


def packed_linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """y[..., rows] = act(x[..., columns] wᵀ + b), every other output exactly 0, plus the residual.

    A row's result is bitwise the same whatever the batch and the number of threads. x and the
    residual may want gradients: the reference serves then, on an unpacked copy of the weight. Under
    autocast both are cast to its dtype.

    Args:
        x (`Tensor` [..., K]): float32, bfloat16 or float16; the weight may have another dtype.
        packed (`Tensor` uint8 [bytes]): from `pack`.
        out_features: N.
        activation: ``"none"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or ``"relu"``.
        residual (`Tensor` [..., N], *optional*): of x's dtype, added after the activation.

    Returns:
        `Tensor` [..., N] of x's dtype.

    Raises:
        ValueError: a shape, a dtype, a device or the activation doesn't fit, or ``packed`` is not
            from `pack`.
        TypeError: x is no float tensor with a last dimension.
    """
    if eager.is_plain(x) and not wants_gradient(x, residual):
        return _cpu.pruned_linear(x, packed, out_features, activation, residual)
    check_choice("activation", activation, ACTIVATIONS)
    _check(x, [packed], [out_features])
    if autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        residual = None if residual is None else residual.to(x.dtype)
    check_residual(residual, x, out_features)
    if wants_gradient(x, residual) or transformed():
        return reference.packed_linear(x, unpack(packed), out_features, activation, residual)
    y: Tensor = ops.packed_linear.default(x, packed, out_features, activation, residual)
    return y


def packed_linears(
    x: Tensor, packed: Sequence[Tensor], out_features: Sequence[int]
) -> list[Tensor]:
    """Return ``[packed_linear(x, p, n) for p, n in zip(packed, out_features)]`` in one call.

    For layers that read the same input (query, key and value; gate and up): one parallel region,
    and one gather for those that keep the same columns. Results are bitwise those of single calls.

    Args:
        x (`Tensor` [..., K]): as for `packed_linear`, gradients and autocast too.
        packed: up to 8 tensors from `pack`.
        out_features: N of each.

    Returns:
        One `Tensor` [..., N] for each layer, of x's dtype.

    Raises:
        ValueError, TypeError: as for `packed_linear`, or the lists don't fit.
    """
    if len(packed) != len(out_features) or len(packed) > _cpu.MOST_LAYERS:
        raise ValueError(
            f"packed and out_features must have one length of at most {_cpu.MOST_LAYERS}, "
            f"got {len(packed)} and {len(out_features)}"
        )
    if eager.is_plain(x) and not wants_gradient(x):
        return _cpu.pruned_linears(x, packed, out_features)
    _check(x, packed, out_features)
    if autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if wants_gradient(x) or transformed():
        return reference.packed_linears(x, [unpack(p) for p in packed], out_features)
    ys: list[Tensor] = ops.packed_linears.default(x, packed, out_features)
    return ys


def packed_glu(
    x: Tensor, gate: Tensor, up: Tensor, out_features: int, activation: str = "silu"
) -> Tensor:
    """Return ``act(packed_linear(x, gate)) * packed_linear(x, up)``, neither of them stored.

    SwiGLU (Shazeer 2020, arXiv 2002.05202) with silu, GEGLU with gelu.

    Args:
        x (`Tensor` [..., K]): as for `packed_linear`, gradients and autocast too.
        gate, up (`Tensor` uint8 [bytes]): from `pack`, with the same dtype, rows and columns.
        out_features: N of both.
        activation: as for `packed_linear`.

    Returns:
        `Tensor` [..., N] of x's dtype.

    Raises:
        ValueError, TypeError: as for `packed_linear`, or the two layers differ.
    """
    if eager.is_plain(x) and not wants_gradient(x):
        return _cpu.pruned_glu(x, gate, up, out_features, activation)
    check_choice("activation", activation, ACTIVATIONS)
    _check(x, [gate, up], [out_features])
    if autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if wants_gradient(x) or transformed():
        return reference.packed_glu(x, unpack(gate), unpack(up), out_features, activation)
    y: Tensor = ops.packed_glu.default(x, gate, up, out_features, activation)
    return y


def _check(x: Tensor, packed: Sequence[Tensor], out_features: Sequence[int]) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise TypeError(
            f"x must be a float tensor with a last dimension, got {x.dim()}-D {x.dtype}"
        )
    for tensor in packed:
        if tensor.device != x.device:
            raise ValueError(f"x must be on packed's device {tensor.device}, got {x.device}")
    for n in out_features:
        if n < 0:
            raise ValueError(f"out_features must not be negative, got {n}")


def _packed_embedding(ids: Tensor, packed: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    args = (ids, packed, features, dtype)
    y: Tensor = dispatch.choose("packed_embedding", "auto", *args).run(*args)
    return y


def _packed_linear(
    x: Tensor, packed: Tensor, out_features: int, activation: str, residual: Tensor | None
) -> Tensor:
    args = (x, packed, out_features, activation, residual)
    y: Tensor = dispatch.choose("packed_linear", "auto", *args).run(*args)
    return y


def _packed_linears(x: Tensor, packed: list[Tensor], out_features: list[int]) -> list[Tensor]:
    args = (x, packed, out_features)
    ys: list[Tensor] = dispatch.choose("packed_linears", "auto", *args).run(*args)
    return ys


def _packed_glu(x: Tensor, gate: Tensor, up: Tensor, out_features: int, activation: str) -> Tensor:
    args = (x, gate, up, out_features, activation)
    y: Tensor = dispatch.choose("packed_glu", "auto", *args).run(*args)
    return y


for _name, _function in (
    ("packed_embedding", _packed_embedding),
    ("packed_linear", _packed_linear),
    ("packed_linears", _packed_linears),
    ("packed_glu", _packed_glu),
):
    library.impl(_name, _function, "CompositeExplicitAutograd")


@register_fake("finegates::packed_embedding", lib=library)  # type: ignore[untyped-decorator]
def _packed_embedding_fake(
    ids: Tensor, packed: Tensor, features: int, dtype: torch.dtype
) -> Tensor:
    return ids.new_empty(*ids.shape, features, dtype=dtype)


@register_fake("finegates::packed_linear", lib=library)  # type: ignore[untyped-decorator]
def _packed_linear_fake(
    x: Tensor, packed: Tensor, out_features: int, activation: str, residual: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@register_fake("finegates::packed_linears", lib=library)  # type: ignore[untyped-decorator]
def _packed_linears_fake(x: Tensor, packed: list[Tensor], out_features: list[int]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], n) for n in out_features]


@register_fake("finegates::packed_glu", lib=library)  # type: ignore[untyped-decorator]
def _packed_glu_fake(
    x: Tensor, gate: Tensor, up: Tensor, out_features: int, activation: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
