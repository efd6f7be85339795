"""A whole encoder layer of packed Linears as one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from . import _cpu_blocks, dispatch, eager
from .checks import check_choice, check_device, transformed, wants_gradient
from .reference import ACTIVATIONS
from .schema import _library as library
from .schema import ops

library.define(
    "encoder_layer(Tensor x, Tensor[] packed, Tensor[] norms, float[] eps, int heads, "
    "int head_size, float scale, str activation, Tensor? mask) -> Tensor"
)


def encoder_layer(
    x: Tensor,
    packed: Sequence[Tensor],
    norms: Sequence[Tensor],
    eps: Sequence[float],
    heads: int,
    head_size: int,
    scale: float,
    activation: str = "gelu",
    mask: Tensor | None = None,
) -> Tensor:
    """One encoder layer with its norms after the residuals, as in BERT (arXiv 1810.04805).

        h = norm₁(x + output(softmax(scale q kᵀ + mask) v)),   q, k, v = query(x), key(x), value(x)
        y = norm₂(h + down(act(up(h))))

    A sequence's result is bitwise the same whatever the rest of the batch, masked keys behind it
    and the number of threads. Gradients run through the reference.

    Args:
        x (`Tensor` [B, S, K]): float32 or bfloat16.
        packed: query, key, value, output, up and down from `pack`: K → heads · head_size three
            times, heads · head_size → K, K → I and I → K.
        norms (`Tensor` [K] each): weight and bias of both norms, of x's dtype.
        eps: of both norms.
        heads, head_size: of the attention; at most 384 features a head.
        scale: of the scores.
        activation: ``"none"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or ``"relu"``.
        mask (`Tensor`, *optional*): broadcastable to [B, heads, S, S]; bool keeps the keys where it
            is True, float32 and bfloat16 are added to the scores. A row that keeps no key, or to
            which the dtype's lowest number is added throughout, attends to all keys alike; with -∞
            throughout it is NaN, as its softmax is.

    Returns:
        `Tensor` [B, S, K] of x's dtype.

    Raises:
        ValueError: a shape, a dtype, a count or the activation doesn't fit.
    """
    if x.dim() != 3:
        raise ValueError(f"x must have shape [B, S, K], got {tuple(x.shape)}")
    for name, given, count in (("packed", packed, 6), ("norms", norms, 4), ("eps", eps, 2)):
        if len(given) != count:
            raise ValueError(f"{name} must have {count} entries, got {len(given)}")
    for norm in norms:
        if norm.shape != x.shape[-1:] or norm.dtype != x.dtype:
            raise ValueError(
                f"norms must be {x.dtype} with shape {tuple(x.shape[-1:])}, "
                f"got {norm.dtype} with shape {tuple(norm.shape)}"
            )
    check_choice("activation", activation, ACTIVATIONS)
    check_device(x, packed=packed, norms=norms, mask=mask)
    if mask is not None:
        mask = _expanded(mask, (x.shape[0], heads, x.shape[1], x.shape[1]))
    args: tuple[Any, ...] = (x, packed, norms, eps, heads, head_size, scale, activation, mask)
    if wants_gradient(x, *norms) or transformed():
        return dispatch.encoder_layer_torch(*args)
    if eager.is_plain(x):
        return _cpu_blocks.encoder_layer(*args)
    y: Tensor = ops.encoder_layer.default(*args)
    return y


def _expanded(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    if mask.dtype not in _cpu_blocks.MASK_TYPES:
        raise ValueError(f"mask must be bool, float32 or bfloat16, got {mask.dtype}")
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"mask must be broadcastable to {shape}, got shape {tuple(mask.shape)}"
        ) from None


def _encoder_layer(*args: Any) -> Tensor:
    y: Tensor = dispatch.choose("encoder_layer", "auto", *args).run(*args)
    return y


library.impl("encoder_layer", _encoder_layer, "CompositeExplicitAutograd")


@register_fake("finegates::encoder_layer", lib=library)  # type: ignore[untyped-decorator]
def _encoder_layer_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
