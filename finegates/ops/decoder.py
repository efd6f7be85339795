"""A stack of Llama layers over a cache of keys and values, as one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from . import dispatch
from .checks import check_choice, check_device, wants_gradient
from .reference import ACTIVATIONS
from .reference_blocks import LINEARS
from .schema import _library as library
from .schema import ops

library.define(
    "decoder(Tensor x, Tensor[] packed, Tensor[] norms, Tensor cos, Tensor sin, Tensor positions, "
    "Tensor(a!)[] keys, Tensor(b!)[] values, SymInt past, Tensor? mask, float eps, float scale, "
    "str activation) -> Tensor"
)


def decoder(
    x: Tensor,
    packed: Sequence[Tensor],
    norms: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    past: int,
    mask: Tensor | None = None,
    *,
    eps: float,
    scale: float,
    activation: str = "silu",
) -> Tensor:
    """A stack of Llama layers for new tokens over a cache, and the norm at the end.

        x += output(softmax(scale q kᵀ) v),   q, k, v = turn(query(n)), turn(key(n)), value(n)
        x += down(act(gate(n)) ⊙ up(n)),      n = norm(x) in both

    The norms are RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), queries and keys turn by halves
    of the head (Su et al. 2021, arXiv 2104.09864), H query heads share G key heads. The new keys
    and values are written into the cache. In fp32 a sequence's result is bitwise the same whatever
    the batch and the number of threads, and whatever the padding on its left among calls with
    S H / G ≤ 16 and among calls with more: few queries sum a score by lanes where D is a multiple
    of the register's, many in one chain. A call of several tokens isn't bitwise as many of one.

    Args:
        x (`Tensor` [B, S, hidden]): float32 or bfloat16, S new tokens.
        packed (7 `Tensor` a layer): from `pack`: query, key, value, output, gate, up, down.
        norms (2 `Tensor` [hidden] a layer and one at the end): of x's dtype.
        cos, sin (`Tensor` [P, D]): of x's dtype, D the even size of a head.
        positions (`Tensor` int64 [B, S]): each token's row of cos and sin.
        keys, values (a `Tensor` [B, G, C, D] for each layer): of x's dtype, with past + S ≤ C; the
            first ``past`` tokens are read, the next S are written.
        past: number of earlier tokens.
        mask (`Tensor` bool, *optional*): [B, T] with T ≥ past + S hides tokens besides those that
            come later; [B, S, T] says it all. Where nothing is visible the result is 0.
        eps: of the norms; scale: of the scores; activation: of the gate.

    Returns:
        `Tensor` [B, S, hidden].

    Raises:
        ValueError: a shape, a dtype or a packed layer doesn't fit; x wants a gradient.
    """
    check_choice("activation", activation, ACTIVATIONS)
    if x.dtype not in (torch.float32, torch.bfloat16) or x.dim() != 3:
        raise ValueError(
            f"x must be float32 or bfloat16 [B, S, hidden], got {x.dtype} {list(x.shape)}"
        )
    if wants_gradient(x):
        raise ValueError("x wants a gradient, and the decoder has none")
    if len(packed) % LINEARS != 0 or not packed:
        raise ValueError(f"packed must hold {LINEARS} layers for each block, got {len(packed)}")
    count = len(packed) // LINEARS
    for name, tensors, wanted in (
        ("norms", norms, 2 * count + 1), ("keys", keys, count), ("values", values, count)
    ):  # fmt: skip
        if len(tensors) != wanted:
            raise ValueError(f"{name} must hold {wanted} tensors, got {len(tensors)}")
    check_device(
        x, packed=packed, norms=norms, cos=cos, sin=sin, positions=positions, keys=keys,
        values=values, mask=mask,
    )  # fmt: skip
    y: Tensor = ops.decoder.default(
        x, packed, norms, cos, sin, positions, keys, values, past, mask, eps, scale, activation
    )
    return y


def _decoder(*args: Any) -> Tensor:
    y: Tensor = dispatch.choose("decoder", "auto", *args).run(*args)
    return y


library.impl("decoder", _decoder, "CompositeExplicitAutograd")


@register_fake("finegates::decoder", lib=library)  # type: ignore[untyped-decorator]
def _decoder_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)
