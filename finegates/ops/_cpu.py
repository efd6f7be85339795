"""The native CPU path: torch tensors on this side, pointers on the other.

``prepare`` packs everything a pruned Linear needs into one plain uint8 tensor: weight panels,
bias, and the kept rows and columns as bit masks, all checked once. ``pruned_linear`` runs it:

    y[..., rows] = act(x[..., columns] wᵀ + bias) (+ residual), every other output exactly 0.

A row's result is bitwise the same whatever the batch, its position in it and the thread count.
Only this file and ``_cpu_blocks.py`` call ``finegates._C``. They have no autograd: the public
functions route there only where no gradient is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from .checks import check_choice
from .reference import Operands

_C: Any = _native._C

ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}
_QUANTIZED_AT_ONCE = 2**20  # weights
MOST_LAYERS = 8  # of one `pruned_linears` call, as in csrc/pruned_linear.cpp
TYPES = {torch.float32: 0, torch.bfloat16: 1}
_WEIGHT_TYPES = {**TYPES, torch.int8: 2}
_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


class Layout(NamedTuple):
    """What a packed tensor says about itself."""

    dtype: torch.dtype
    n_rows: int
    n_columns: int
    out_features: int
    in_features: int
    has_bias: bool
    has_rows: bool
    has_columns: bool
    bias_offset: int
    scale_offset: int


def why_not(x: Tensor, weight: Tensor | None = None) -> str | None:
    """Return in one line why the native path cannot serve ``x`` (and ``weight``), or None."""
    if _C is None:
        return _native.reason()
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    if x.dtype not in TYPES and x.dtype != torch.float16:
        return f"x is {x.dtype}, not float32, bfloat16 or float16"
    if weight is not None and weight.device.type != "cpu":
        return f"weight is on {weight.device}, not on the CPU"
    if weight is not None and weight.dtype not in TYPES and weight.dtype != torch.uint8:
        return f"weight is {weight.dtype}, not float32 or bfloat16"
    return None


def _index(name: str, index: Tensor | None) -> Tensor | None:
    """Return a contiguous int32 copy of kept indices."""
    if index is None:
        return None
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be a 1-D int32 tensor, got {index.dim()}-D {index.dtype}")
    if index.dtype == torch.int64 and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -(2**31) or high > 2**31 - 1:
            raise ValueError(f"{name} must fit int32, got values in [{low}, {high}]")
    return contiguous(index.cpu(), torch.int32)


def _row_values(name: str, values: Tensor | None, n_rows: int) -> Tensor | None:
    """Return one float32 for each kept row, contiguous."""
    if values is None:
        return None
    if values.shape != (n_rows,):
        raise ValueError(f"{name} must have shape ({n_rows},), got {tuple(values.shape)}")
    return contiguous(values.detach().cpu(), torch.float32)


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def room(like: Tensor, *shape: int, **dtype: Any) -> Tensor:
    """Return an uninitialised tensor beside ``like``, whatever torch's default device is.

    Raises:
        ValueError: a size is negative; MemoryError: there is no room.
    """
    try:
        return like.new_empty(*shape, **dtype)
    except RuntimeError as error:
        raise _no_room(shape) from error


def _no_room(shape: tuple[int, ...]) -> Exception:
    if min(shape) < 0:
        return ValueError(f"out_features must not be negative, got {shape[-1]}")
    return MemoryError(f"no room for a tensor of shape {shape}")


def contiguous(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``tensor`` contiguous, in another dtype if given: itself where it is so already.

    Raises:
        MemoryError: there is no room for a copy.
    """
    try:
        # By name: 0.6 us less.
        return (tensor if dtype is None else tensor.to(dtype=dtype)).contiguous()
    except RuntimeError as error:
        raise _no_room(tuple(tensor.shape)) from error


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must be 2-D, got {weight.dim()}-D")
    if weight.device.type != "cpu":
        raise ValueError(f"weight must be on the CPU, got {weight.device}")


def prepare(
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    out_features: int | None = None,
    in_features: int | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Pack a compact weight with its bias and kept indices for :func:`pruned_linear`.

    Args:
        weight (`Tensor` [n_rows, n_columns]): float32, bfloat16 or, with ``scale``, int8 in
            [-127, 127]; float16 becomes float32.
        bias (`Tensor` [n_rows], *optional*): any float dtype, kept as float32.
        rows (`Tensor` [n_rows], *optional*): strictly increasing kept outputs, None for all.
        columns (`Tensor` [n_columns], *optional*): strictly increasing kept inputs, None for all.
        out_features, in_features (`int`, *optional*): full sizes; default to the weight's.
        scale (`Tensor` [n_rows], *optional*): of an int8 weight, see :func:`quantize_rows`.

    Returns:
        `Tensor` [bytes]: uint8, with a header. A plain tensor: it may be copied and moved.

    Raises:
        ValueError: a size or an index does not fit, naming which; MemoryError: there is no room.
    """
    _check_weight(weight)
    if weight.dtype == torch.float16:
        weight = contiguous(weight, torch.float32)
    if weight.dtype not in _WEIGHT_TYPES:
        raise ValueError(f"weight must be float32, bfloat16, float16 or int8, got {weight.dtype}")
    if (scale is None) != (weight.dtype != torch.int8):
        raise ValueError(f"scale goes with an int8 weight and only there, got {weight.dtype}")
    n_rows, n_columns = weight.shape
    weight = contiguous(weight.detach())
    rows, columns = _index("rows", rows), _index("columns", columns)
    for name, index, kept in (("rows", rows, n_rows), ("columns", columns, n_columns)):
        if index is not None and index.numel() != kept:
            raise ValueError(f"{name} has {index.numel()} entries, the weight {kept}")
    bias, scale = _row_values("bias", bias, n_rows), _row_values("scale", scale, n_rows)
    shape = (
        _WEIGHT_TYPES[weight.dtype],
        n_rows,
        n_columns,
        n_rows if out_features is None else out_features,
        n_columns if in_features is None else in_features,
        (bias is not None) + 2 * (rows is not None) + 4 * (columns is not None),
        pointer(rows),
        pointer(columns),
    )
    packed = room(weight, _C.packed_bytes(*shape), dtype=torch.uint8)
    _C.pack(
        *shape,
        pointer(weight),
        pointer(bias),
        pointer(scale),
        packed.data_ptr(),
        packed.numel(),
    )
    return packed


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 q and float32 scale [rows] with ``weight ≈ q * scale[:, None]``.

    Symmetric round to nearest, the largest magnitude of a row at 127: error ≤ scale / 2.

    Raises:
        ValueError: weight is no matrix on the CPU, or a row of it has a NaN or an Inf.
    """
    _check_weight(weight)
    weight = weight.detach()
    q = room(weight, *weight.shape, dtype=torch.int8)
    scale = room(weight, len(weight), dtype=torch.float32)
    # In blocks: a whole output embedding in fp32 may be all the memory there is.
    step = max(1, _QUANTIZED_AT_ONCE // max(1, weight.shape[1]))
    for first in range(0, len(weight), step):
        here = slice(first, first + step)
        wide = contiguous(weight[here], torch.float32)
        largest = wide.abs().amax(dim=1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
        finite = largest.isfinite()
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise ValueError(
                f"weight must be finite to become int8, got {largest[row]} in row {first + row}"
            )
        unit = largest / 127
        unit = torch.where(unit > 0, unit, torch.ones_like(unit))  # 0, or too small to divide
        q[here] = torch.round(wide / unit[:, None]).clamp_(-127, 127)
        scale[here] = unit
    return q, scale


def aligned(packed: Tensor) -> Tensor:
    """Return ``packed`` itself, or a copy where it is not 64-byte aligned and contiguous."""
    if packed.dtype is not torch.uint8 or packed.dim() != 1 or not packed.is_cpu:
        raise ValueError(
            f"packed must be a 1-D uint8 CPU tensor, got {packed.dim()}-D {packed.dtype} "
            f"on {packed.device}"
        )
    if packed.is_contiguous() and not packed.data_ptr() & 63:
        return packed
    return room(packed, packed.numel()).copy_(packed)


def describe(packed: Tensor) -> Layout:
    """Return what ``packed`` holds; ValueError if it is not from :func:`prepare`."""
    packed = aligned(packed)
    d = _C.describe(packed.data_ptr(), packed.numel())
    return Layout(
        _DTYPES[d["type"]],
        d["rows"],
        d["columns"],
        d["out_features"],
        d["in_features"],
        d["has_bias"],
        d["has_rows"],
        d["has_columns"],
        d["bias_offset"],
        d["scale_offset"],
    )


def unpack(packed: Tensor) -> Operands:
    """Return what :func:`prepare` was given: the weight bit for bit, bias and scale in float32."""
    packed = aligned(packed)
    d = describe(packed)
    weight = room(packed, d.n_rows, d.n_columns, dtype=d.dtype)
    rows = room(packed, d.n_rows, dtype=torch.int32) if d.has_rows else None
    columns = room(packed, d.n_columns, dtype=torch.int32) if d.has_columns else None
    _C.unpack(packed.data_ptr(), packed.numel(), pointer(weight), pointer(rows), pointer(columns))
    bias = _row_floats(packed, d.bias_offset, d.n_rows).clone() if d.has_bias else None
    scale = _row_floats(packed, d.scale_offset, d.n_rows).clone() if d.dtype == torch.int8 else None
    return Operands(weight, bias, rows, columns, scale)


def embedding(ids: Tensor, packed: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """Return rows of a packed weight, see :func:`finegates.ops.packed_embedding`.

    Raises:
        IndexError: an id is no row.
        ValueError: the layer misses rows or columns, or has others than ``features``.
    """
    packed = aligned(packed)
    d = describe(packed)
    if d.n_rows != d.out_features or not features == d.n_columns == d.in_features:
        raise ValueError(
            f"packed must keep all of its {d.out_features} rows and of {features} columns, "
            f"got {d.n_rows} rows and {d.n_columns} of {d.in_features} columns"
        )
    ids = contiguous(ids, torch.int64)
    y = room(packed, *ids.shape, features, dtype=d.dtype)
    _C.unpack_rows(packed.data_ptr(), packed.numel(), pointer(ids), ids.numel(), pointer(y))
    if d.dtype == torch.int8:
        y = y * _row_floats(packed, d.scale_offset, d.n_rows)[ids][..., None]
    return contiguous(y, dtype)


def _row_floats(packed: Tensor, offset: int, n_rows: int) -> Tensor:
    return packed[offset : offset + 4 * n_rows].view(torch.float32)


def pruned_linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Return ``y[..., rows] = act(x[..., columns] wᵀ + bias) (+ residual)``, zero elsewhere.

    Args:
        x (`Tensor` [..., in_features]): float32, bfloat16 or (converted) float16.
        packed (`Tensor` [bytes]): from :func:`prepare`.
        out_features (`int`): the layer's full output size; checked against ``packed``.
        activation (`str`): none, gelu, gelu_tanh, silu or relu.
        residual (`Tensor` [..., out_features], *optional*): added everywhere, after ``act``.

    Returns:
        `Tensor` [..., out_features] with x's dtype.

    Raises:
        ValueError: an argument does not fit; TypeError: x is not a float CPU tensor with a last
            dimension; MemoryError: there is no room for y.
    """
    # About 2 us a call, as much as F.linear: sizes go to new_empty one by one, because parsing
    # a tuple costs another 0.7 us.
    kind = TYPES.get(x.dtype)
    shape = x.shape
    if kind is None or not shape or not x.is_cpu:
        return _converted(x, packed, out_features, activation, residual)
    code = ACTIVATIONS.get(activation)
    if code is None:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if len(shape) == 2:
        m, k = shape
        try:  # room without its call: 0.15 us
            y = x.new_empty(m, out_features)
        except RuntimeError as error:
            raise _no_room((m, out_features)) from error
    else:
        *leading, k = shape
        m = math.prod(leading)
        y = room(x, *leading, out_features)
    stride = k
    if not x.is_contiguous():
        if len(shape) == 2 and x.stride(1) == 1 and x.stride(0) >= k:
            stride = x.stride(0)
        else:
            x = contiguous(x)
    if residual is not None:
        if residual.shape != y.shape or residual.dtype != x.dtype or not residual.is_cpu:
            raise ValueError(
                f"residual must be {x.dtype} {tuple(y.shape)}, "
                f"got {residual.dtype} {tuple(residual.shape)} on {residual.device}"
            )
        residual = contiguous(residual)
    # aligned without its call: 0.1 us.
    if not packed.is_cpu or packed.dtype is not torch.uint8 or not packed.is_contiguous():
        packed = aligned(packed)
    buffer = packed.data_ptr()
    if buffer & 63:
        packed = aligned(packed)
        buffer = packed.data_ptr()
    torch.get_num_threads()  # carries torch.set_num_threads into a new Python thread, 17 ns
    _C.pruned_linear(
        buffer,
        packed.numel(),
        x.data_ptr(),
        m,
        k,
        stride,
        kind,
        y.data_ptr(),
        out_features,
        0 if residual is None else residual.data_ptr(),
        code,
    )
    return y


def pruned_linears(
    x: Tensor, packed: Sequence[Tensor], out_features: Sequence[int]
) -> list[Tensor]:
    """Return ``[pruned_linear(x, p, n) for p, n in zip(packed, out_features)]`` in one call.

    For layers that read the same input (query, key, value; gate, up): one parallel region, and x
    is gathered once for layers that keep the same columns. At most `MOST_LAYERS`.
    """
    wide, kind, stride = _operand(x)
    *leading, k = wide.shape
    m = math.prod(leading)
    # One flat list: four times fewer objects for the binding to take apart.
    layers: list[int] = []
    ys: list[Tensor] = []
    packed = [aligned(p) for p in packed]
    for p, n in zip(packed, out_features, strict=True):
        y = room(wide, *leading, n)
        layers += (p.data_ptr(), p.numel(), y.data_ptr(), n)
        ys.append(y)
    _C.pruned_linears(layers, wide.data_ptr(), m, k, stride, kind)
    return ys if wide.dtype is x.dtype else [contiguous(y, x.dtype) for y in ys]


def pruned_glu(
    x: Tensor, gate: Tensor, up: Tensor, out_features: int, activation: str = "silu"
) -> Tensor:
    """Return ``act(pruned_linear(x, gate)) * pruned_linear(x, up)`` without storing either.

    Args:
        x (`Tensor` [..., in_features]): float32, bfloat16 or (converted) float16.
        gate, up (`Tensor` [bytes]): from :func:`prepare`, same dtype, kept rows and columns.
        out_features (`int`): the full output size of both.
        activation (`str`): silu (SwiGLU), gelu or gelu_tanh (GEGLU), relu or none.
    """
    check_choice("activation", activation, tuple(ACTIVATIONS))
    wide, kind, stride = _operand(x)
    gate, up = aligned(gate), aligned(up)
    *leading, k = wide.shape
    y = room(wide, *leading, out_features)
    _C.pruned_glu(
        gate.data_ptr(),
        gate.numel(),
        up.data_ptr(),
        up.numel(),
        wide.data_ptr(),
        math.prod(leading),
        k,
        stride,
        kind,
        y.data_ptr(),
        out_features,
        ACTIVATIONS[activation],
    )
    return y if wide.dtype is x.dtype else contiguous(y, x.dtype)


def probe_flops(dtype: torch.dtype) -> float:
    """Return multiply-adds times two a second that the calling thread's core reaches.

    Args:
        dtype: bfloat16 asks for the dot product, which falls back to float32 where there is none.

    Raises:
        ValueError: there is no native module, or no measurement for its level.
    """
    flops = 0.0 if _C is None else float(_C.probe_flops(dtype is torch.bfloat16))
    if not flops:
        raise ValueError(f"no measured peak here: {_native.reason() or f'level {_native.isa()}'}")
    return flops


def probe_read(buffer: Tensor, streams: int, ahead: int) -> float:
    """Return bytes a second of the calling thread's pass over a uint8 tensor.

    Args:
        buffer (`Tensor` uint8 [bytes]): read once, a word of each 64-byte line.
        streams: 1, 2 or 4 parts of it that are read side by side.
        ahead: lines between what is prefetched and what is read.

    Raises:
        ValueError: there is no native module.
    """
    if _C is None:
        raise ValueError(f"no measured bandwidth here: {_native.reason()}")
    return float(_C.probe_read(buffer.data_ptr(), buffer.numel(), streams, ahead))


def _operand(x: Tensor) -> tuple[Tensor, int, int]:
    """Return x as the kernels read it (float16 in float32), its type code and row stride."""
    torch.get_num_threads()  # carries torch.set_num_threads into a new Python thread
    if x.dtype is torch.float16:
        x = contiguous(x, torch.float32)
    kind = TYPES.get(x.dtype)
    if kind is None or not x.is_cpu or x.dim() == 0:
        raise TypeError(
            "x must be a float32, bfloat16 or float16 CPU tensor with a last dimension, "
            f"got {x.dim()}-D {x.dtype} on {x.device}"
        )
    k = x.shape[-1]
    if x.dim() == 2 and not x.is_contiguous() and x.stride(1) == 1 and x.stride(0) >= k:
        return x, kind, x.stride(0)
    return contiguous(x), kind, k


def _converted(
    x: Tensor, packed: Tensor, out_features: int, activation: str, residual: Tensor | None
) -> Tensor:
    """Run float16 in float32; refuse everything else."""
    wide, _, _ = _operand(x)
    residual = None if residual is None else contiguous(residual, torch.float32)
    y = pruned_linear(wide, packed, out_features, activation, residual)
    return contiguous(y, torch.float16)
