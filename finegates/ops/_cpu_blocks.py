"""Whole blocks of transformers on the native path: an encoder layer, a stack of decoder layers.

As in ``_cpu.py`` there is no autograd here; the public ops say what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ._cpu import (
    ACTIVATIONS,
    TYPES,
    aligned,
    contiguous,
    describe,
    pointer,
    pruned_glu,
    room,
)
from .checks import check_device
from .reference_blocks import LINEARS

_C: Any = _native._C

MOST_HEAD = 384  # features of a head, as in csrc/kernels.h
STAGES = 7  # of a decoder's layer, see csrc/decoder.h
MASK_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.bool: 3}


_stage_seconds: ContextVar[list[Tensor] | None] = ContextVar("stage_seconds", default=None)


@contextmanager
def timed_stages() -> Iterator[list[Tensor]]:
    """Time the stages of each `decoder` call inside the block.

    Yields:
        A list to which each call appends the seconds `Tensor` float64 [layers · STAGES + 1] of
        norm, q k v, attention, output, norm, gate and up, down; and of the norm at the end.
    """
    found: list[Tensor] = []
    token = _stage_seconds.set(found)
    try:
        yield found
    finally:
        _stage_seconds.reset(token)


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
    x = contiguous(x)
    y = room(x, *x.shape)
    packed = [aligned(p) for p in packed]
    norms = [norm.contiguous() for norm in norms]
    mask_type, mask_address, strides = 0, 0, [0, 0, 0]
    if mask is not None:
        if mask.stride(-1) != 1:
            mask = contiguous(mask)
        mask_type, mask_address = MASK_TYPES[mask.dtype], mask.data_ptr()
        strides = [stride * mask.element_size() for stride in mask.stride()[:3]]
    _C.encoder_layer(
        [*(p.data_ptr() for p in packed), *(p.numel() for p in packed)],
        [norm.data_ptr() for norm in norms],
        eps,
        [*x.shape, heads, head_size],
        scale,
        ACTIVATIONS[activation],
        TYPES[x.dtype],
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
        self.packed = [aligned(p.detach()) for p in packed]
        self.norms = [norm.detach().contiguous() for norm in norms]
        self.hidden, self.dtype = len(self.norms[0]), self.norms[0].dtype
        self.count = len(self.packed) // LINEARS
        for norm in self.norms:
            if norm.shape != (self.hidden,) or norm.dtype != self.dtype or not norm.is_cpu:
                raise ValueError(
                    f"norms must be {self.dtype} [{self.hidden}], "
                    f"got {norm.dtype} {list(norm.shape)} on {norm.device}"
                )
        rows = []
        for i in range(self.count):
            layer = self.packed[LINEARS * i : LINEARS * (i + 1)]
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
    kind = TYPES.get(x.dtype)
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
            mask = contiguous(mask)
        mask_tokens, mask_batch = mask.shape[-1], mask.stride(0)
        mask_query = mask.stride(1) if mask.dim() == 3 else 0
    x, cos, sin = contiguous(x), contiguous(cos), contiguous(sin)
    positions = contiguous(positions, torch.int64)
    y = room(x, *x.shape)
    if y.numel() == 0:
        return y
    seconds, timed = None, _stage_seconds.get()
    if timed is not None:
        seconds = room(positions, STAGES * layers.count + 1, dtype=torch.float64)
        timed.append(seconds)
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
        pointer(mask),
        (mask_tokens, mask_batch, mask_query),
        mask is None or mask.dim() == 2,
        scale,
        pointer(seconds),
    )
    return y
