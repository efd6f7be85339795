"""The native CPU path: torch tensors on this side, pointers on the other.

``prepare`` packs everything a pruned Linear needs into one plain uint8 tensor: weight panels,
bias, and the kept rows and columns as bit masks, all checked once. ``pruned_linear`` runs it:

    y[..., rows] = act(x[..., columns] wᵀ + bias) (+ residual), every other output exactly 0.

A row's result is bitwise the same whatever the batch, its position in it and the thread count.
This file is the only caller of ``finegates._C``. It has no autograd: the public function routes
there only where no gradient is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from .checks import check_choice, check_device
from .reference import Operands

_C: Any = _native._C

ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}
MOST_HEAD = 256  # features of a head of the decoder, as in csrc/kernels.h
MOST_ENCODER_HEAD = 384  # the same of the encoder layer
MOST_LAYERS = 8  # of one `pruned_linears` call, as in csrc/pruned_linear.cpp
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_WEIGHT_TYPES = {**_TYPES, torch.int8: 2}
MASK_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.bool: 3}
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
    if x.dtype not in _TYPES and x.dtype != torch.float16:
        return f"x is {x.dtype}, not float32, bfloat16 or float16"
    if weight is not None and weight.device.type != "cpu":
        return f"weight is on {weight.device}, not on the CPU"
    if weight is not None and weight.dtype not in _TYPES and weight.dtype != torch.uint8:
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
    return index.to(device="cpu", dtype=torch.int32).contiguous()


def _row_values(name: str, values: Tensor | None, n_rows: int) -> Tensor | None:
    """Return one float32 for each kept row, contiguous."""
    if values is None:
        return None
    if values.shape != (n_rows,):
        raise ValueError(f"{name} must have shape ({n_rows},), got {tuple(values.shape)}")
    return values.detach().to(device="cpu", dtype=torch.float32).contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _room(like: Tensor, *shape: int, **dtype: Any) -> Tensor:
    """Return an uninitialised tensor beside ``like``, whatever torch's default device is.

    Raises:
        ValueError: a size is negative; MemoryError: there is no room.
    """
    try:
        return like.new_empty(*shape, **dtype)
    except RuntimeError as error:
        if min(shape) < 0:
            raise ValueError(f"out_features must not be negative, got {shape[-1]}") from error
        raise MemoryError(f"no room for a tensor of shape {shape}") from error


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
        weight = weight.float()
    if weight.dtype not in _WEIGHT_TYPES:
        raise ValueError(f"weight must be float32, bfloat16, float16 or int8, got {weight.dtype}")
    if (scale is None) != (weight.dtype != torch.int8):
        raise ValueError(f"scale goes with an int8 weight and only there, got {weight.dtype}")
    n_rows, n_columns = weight.shape
    weight = weight.detach().contiguous()
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
        _pointer(rows),
        _pointer(columns),
    )
    packed = _room(weight, _C.packed_bytes(*shape), dtype=torch.uint8)
    _C.pack(
        *shape,
        _pointer(weight),
        _pointer(bias),
        _pointer(scale),
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
    wide = weight.detach().float()
    largest = wide.abs().amax(dim=1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    finite = largest.isfinite()
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"weight must be finite to become int8, got {largest[row]} in row {row}")
    scale = largest / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # 0, or too small to divide
    q = torch.round(wide / scale[:, None]).clamp_(-127, 127)
    return q.to(torch.int8), scale


def _aligned(packed: Tensor) -> Tensor:
    """Return ``packed`` itself, or a copy where it is not 64-byte aligned and contiguous."""
    if packed.dtype is not torch.uint8 or packed.dim() != 1 or not packed.is_cpu:
        raise ValueError(
            f"packed must be a 1-D uint8 CPU tensor, got {packed.dim()}-D {packed.dtype} "
            f"on {packed.device}"
        )
    if packed.is_contiguous() and not packed.data_ptr() & 63:
        return packed
    return _room(packed, packed.numel()).copy_(packed)


def describe(packed: Tensor) -> Layout:
    """Return what ``packed`` holds; ValueError if it is not from :func:`prepare`."""
    packed = _aligned(packed)
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
    packed = _aligned(packed)
    d = describe(packed)
    weight = _room(packed, d.n_rows, d.n_columns, dtype=d.dtype)
    rows = _room(packed, d.n_rows, dtype=torch.int32) if d.has_rows else None
    columns = _room(packed, d.n_columns, dtype=torch.int32) if d.has_columns else None
    _C.unpack(
        packed.data_ptr(), packed.numel(), _pointer(weight), _pointer(rows), _pointer(columns)
    )

    def values(offset: int) -> Tensor:
        return packed[offset : offset + 4 * d.n_rows].view(torch.float32).clone()

    bias = values(d.bias_offset) if d.has_bias else None
    scale = values(d.scale_offset) if d.dtype == torch.int8 else None
    return Operands(weight, bias, rows, columns, scale)


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
    kind = _TYPES.get(x.dtype)
    shape = x.shape
    if kind is None or not shape or not x.is_cpu:
        return _converted(x, packed, out_features, activation, residual)
    code = ACTIVATIONS.get(activation)
    if code is None:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if len(shape) == 2:
        m, k = shape
        y = _room(x, m, out_features)
    else:
        *leading, k = shape
        m = math.prod(leading)
        y = _room(x, *leading, out_features)
    stride = k
    if not x.is_contiguous():
        if len(shape) == 2 and x.stride(1) == 1 and x.stride(0) >= k:
            stride = x.stride(0)
        else:
            x = x.contiguous()
    if residual is not None:
        if residual.shape != y.shape or residual.dtype != x.dtype or not residual.is_cpu:
            raise ValueError(
                f"residual must be {x.dtype} {tuple(y.shape)}, "
                f"got {residual.dtype} {tuple(residual.shape)} on {residual.device}"
            )
        residual = residual.contiguous()
    # _aligned without its call: 0.1 us.
    if not packed.is_cpu or packed.dtype is not torch.uint8 or not packed.is_contiguous():
        packed = _aligned(packed)
    buffer = packed.data_ptr()
    if buffer & 63:
        packed = _aligned(packed)
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
    packed = [_aligned(p) for p in packed]
    for p, n in zip(packed, out_features, strict=True):
        y = _room(wide, *leading, n)
        layers += (p.data_ptr(), p.numel(), y.data_ptr(), n)
        ys.append(y)
    _C.pruned_linears(layers, wide.data_ptr(), m, k, stride, kind)
    return ys if wide.dtype is x.dtype else [y.to(x.dtype) for y in ys]


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
    gate, up = _aligned(gate), _aligned(up)
    *leading, k = wide.shape
    y = _room(wide, *leading, out_features)
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
    return y if wide.dtype is x.dtype else y.to(x.dtype)


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


def probe_read(buffer: Tensor) -> float:
    """Return bytes a second that the calling thread reads from a uint8 tensor.

    Raises:
        ValueError: there is no native module.
    """
    if _C is None:
        raise ValueError(f"no measured bandwidth here: {_native.reason()}")
    return float(_C.probe_read(buffer.data_ptr(), buffer.numel()))


def encoder_layer(
    x: Tensor,
    packed: Sequence[Tensor],
    norms: Sequence[Tensor],
    eps: Sequence[float],
    heads: int,
    head_size: int,
    scale: float,
    activation: str,
    mask: Tensor | None,
) -> Tensor:
    """Run `reference.encoder_layer` in one call.

    Args:
        x (`Tensor` [B, S, K]): float32 or bfloat16.
        packed: query, key, value, output, up and down, from :func:`prepare`.
        norms: weight and bias of both norms, of x's dtype; eps of both.
        mask (`Tensor` [B, heads, S, S], *optional*): expanded, of a dtype of `MASK_TYPES`.
    """
    torch.get_num_threads()  # carries torch.set_num_threads into a new Python thread
    x = x.contiguous()
    y = _room(x, *x.shape)
    packed = [_aligned(p) for p in packed]
    norms = [norm.contiguous() for norm in norms]
    mask_type, mask_address, strides = 0, 0, [0, 0, 0]
    if mask is not None:
        if mask.stride(-1) != 1:
            mask = mask.contiguous()
        mask_type, mask_address = MASK_TYPES[mask.dtype], mask.data_ptr()
        strides = [stride * mask.element_size() for stride in mask.stride()[:3]]
    _C.encoder_layer(
        [*(p.data_ptr() for p in packed), *(p.numel() for p in packed)],
        [norm.data_ptr() for norm in norms],
        eps,
        [*x.shape, heads, head_size],
        scale,
        ACTIVATIONS[activation],
        _TYPES[x.dtype],
        x.data_ptr(),
        y.data_ptr(),
        mask_type,
        mask_address,
        strides,
    )
    return y


class DecoderLayers:
    """The packed Linears and norms of a stack of Llama layers, and their addresses in one table.

    Args:
        packed: query, key, value, output, gate, up and down of each layer, from :func:`prepare`.
        norms: attention's and the MLP's [hidden] of each layer, and one at the end.

    Raises:
        ValueError: gate and up of a layer don't keep the same rows and columns.
    """

    def __init__(self, packed: Sequence[Tensor], norms: Sequence[Tensor]) -> None:
        # Aliases: the addresses stay good whatever happens to the modules.
        self.packed = [_aligned(p.detach()) for p in packed]
        self.norms = [norm.detach().contiguous() for norm in norms]
        self.hidden, self.dtype = len(self.norms[0]), self.norms[0].dtype
        self.count = len(self.packed) // 7
        for norm in self.norms:
            if norm.shape != (self.hidden,) or norm.dtype != self.dtype or not norm.is_cpu:
                raise ValueError(
                    f"norms must be {self.dtype} [{self.hidden}], "
                    f"got {norm.dtype} {list(norm.shape)} on {norm.device}"
                )
        rows = []
        for i in range(self.count):
            layer = self.packed[7 * i : 7 * i + 7]
            inner = describe(layer[4])
            pruned_glu(self.norms[0].new_empty(0, inner.in_features), layer[4], layer[5],
                       inner.out_features)  # fmt: skip
            norm_pair = self.norms[2 * i : 2 * i + 2]
            rows.append(
                [p.data_ptr() for p in layer]
                + [p.numel() for p in layer]
                + [norm.data_ptr() for norm in norm_pair]
            )
        self.table = torch.tensor(rows, dtype=torch.int64, device="cpu")

    def __reduce__(self) -> tuple[type[DecoderLayers], tuple[list[Tensor], list[Tensor]]]:
        return DecoderLayers, (self.packed, self.norms)


def decoder(
    x: Tensor,
    layers: DecoderLayers,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    past: int,
    mask: Tensor | None,
    eps: float,
    scale: float,
    activation: str,
) -> Tensor:
    """Run a stack of Llama layers, see :func:`finegates.ops.decoder.decoder`.

    Raises:
        ValueError: an argument does not fit; TypeError: x is not a float CPU tensor.
    """
    kind = _TYPES.get(x.dtype)
    if kind is None or not x.is_cpu:
        raise TypeError(f"x must be a float32 or bfloat16 CPU tensor, got {x.dtype} on {x.device}")
    if x.dim() != 3 or x.shape[2] != layers.hidden or x.dtype != layers.dtype:
        raise ValueError(
            f"x must be {layers.dtype} [B, S, {layers.hidden}], got {x.dtype} {list(x.shape)}"
        )
    batch, queries, hidden = x.shape
    shape = keys[0].shape
    fits = len(shape) == 4 and shape[0] == batch and shape[3] > 0
    for name, side in (("keys", keys), ("values", values)):
        for t in side:
            if not (
                fits and t.shape == shape and t.dtype == x.dtype and t.is_cpu and t.is_contiguous()
            ):
                raise ValueError(
                    f"{name} must be contiguous {x.dtype} [{batch}, G, C, D] of one shape on the "
                    f"CPU, got {t.dtype} {list(t.shape)} on {t.device}"
                )
    _, groups, capacity, head = shape
    check_device(x, cos=cos, sin=sin, positions=positions, mask=mask)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape[1] != head or table.dtype != x.dtype:
            raise ValueError(
                f"{name} must be {x.dtype} [P, {head}], got {table.dtype} {list(table.shape)}"
            )
    if sin.shape != cos.shape or positions.shape != (batch, queries):
        raise ValueError(
            f"positions must be [{batch}, {queries}] and sin like cos, "
            f"got {list(positions.shape)} and {list(sin.shape)}"
        )
    mask_tokens = mask_batch = mask_query = 0
    if mask is not None:
        wanted = (batch,) if mask.dim() == 2 else (batch, queries)
        if mask.dtype != torch.bool or mask.dim() > 3 or mask.shape[:-1] != wanted:
            raise ValueError(
                f"mask must be bool [{batch}, T] or [{batch}, {queries}, T], "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        if mask.stride(-1) != 1:
            mask = mask.contiguous()
        mask_tokens, mask_batch = mask.shape[-1], mask.stride(0)
        mask_query = mask.stride(1) if mask.dim() == 3 else 0
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    positions = positions.to(torch.int64).contiguous()
    y = _room(x, *x.shape)
    if y.numel() == 0:
        return y
    torch.get_num_threads()  # carries torch.set_num_threads into a new Python thread
    _C.decoder(
        layers.table.data_ptr(),
        layers.count,
        [t.data_ptr() for pair in zip(keys, values, strict=True) for t in pair],
        layers.norms[-1].data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        hidden,
        eps,
        ACTIVATIONS[activation],
        kind,
        (batch, queries, describe(layers.packed[0]).out_features // head, groups, head),
        past,
        capacity,
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[0],
        positions.data_ptr(),
        _pointer(mask),
        (mask_tokens, mask_batch, mask_query),
        mask is None or mask.dim() == 2,
        scale,
    )
    return y


def _operand(x: Tensor) -> tuple[Tensor, int, int]:
    """Return x as the kernels read it (float16 in float32), its type code and row stride."""
    torch.get_num_threads()  # carries torch.set_num_threads into a new Python thread
    if x.dtype is torch.float16:
        x = x.float()
    kind = _TYPES.get(x.dtype)
    if kind is None or not x.is_cpu or x.dim() == 0:
        raise TypeError(
            "x must be a float32, bfloat16 or float16 CPU tensor with a last dimension, "
            f"got {x.dim()}-D {x.dtype} on {x.device}"
        )
    k = x.shape[-1]
    if x.dim() == 2 and not x.is_contiguous() and x.stride(1) == 1 and x.stride(0) >= k:
        return x, kind, x.stride(0)
    return x.contiguous(), kind, k


def _converted(
    x: Tensor, packed: Tensor, out_features: int, activation: str, residual: Tensor | None
) -> Tensor:
    """Run float16 in float32; refuse everything else."""
    wide, _, _ = _operand(x)
    residual = None if residual is None else residual.float()
    return pruned_linear(wide, packed, out_features, activation, residual).half()
