"""The law of whole blocks of transformers: an encoder layer, a stack of decoder layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import Operands, packed_glu, packed_linear

LINEARS = 7  # of a decoder's layer: query, key, value, output, gate, up, down


def encoder_layer(
    x: Tensor,
    layers: Sequence[Operands],
    inner: int,
    norms: Sequence[Tensor],
    eps: Sequence[float],
    heads: int,
    head_size: int,
    scale: float,
    activation: str,
    mask: Tensor | None,
) -> Tensor:
    """h = norm₁(x + output(softmax(scale q kᵀ + mask) v)), y = norm₂(h + down(act(up(h)))).

    Args:
        x (`Tensor` [B, S, K]): input.
        layers: query, key, value, output, up and down; inner: the features between the last two.
        norms (`Tensor` [K]): weight and bias of both norms; eps of both.
        mask: broadcastable to [B, heads, S, S]; True where a key is kept, or added to the scores.

    Returns:
        `Tensor` [B, S, K].
    """
    query, key, value, output, up, down = layers
    features, width = x.shape[-1], heads * head_size
    q, k, v = (
        packed_linear(x, layer, width).view(*x.shape[:2], heads, head_size).transpose(1, 2)
        for layer in (query, key, value)
    )
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    h = x + packed_linear(attended, output, features)
    h = F.layer_norm(h, (features,), norms[0], norms[1], eps[0])
    y = h + packed_linear(packed_linear(h, up, inner, activation), down, features)
    return F.layer_norm(y, (features,), norms[2], norms[3], eps[1])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight ⊙ x / sqrt(mean(x²) + eps), the mean in fp32 at least.

    The quotient is rounded to x's dtype before the weight meets it, as in transformers' Llama.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def decoder(
    x: Tensor,
    layers: Sequence[tuple[Operands, int]],
    norms: Sequence[Tensor],
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
    """A stack of Llama layers, see `finegates.ops.decoder.decoder`; keys and values are written.

    Args:
        layers: query, key, value, output, gate, up and down of each block, with their out_features.
    """
    batch, queries, _ = x.shape
    tokens, head = past + queries, cos.shape[-1]
    seen = torch.ones(queries, tokens, dtype=torch.bool, device=x.device).tril(past)[None]
    if mask is not None:
        mask = mask[..., :tokens]
        seen = mask if mask.dim() == 3 else seen & mask[:, None]
    hidden = ~seen[:, None]
    cos, sin = cos[positions][:, None], sin[positions][:, None]

    def heads(y: Tensor) -> Tensor:
        return y.view(batch, queries, -1, head).transpose(1, 2)

    def turn(y: Tensor) -> Tensor:
        low, high = y.chunk(2, dim=-1)
        return y * cos + torch.cat((-high, low), dim=-1) * sin

    for i in range(len(keys)):
        block = layers[LINEARS * i : LINEARS * (i + 1)]
        (q, n_q), (k, n_k), (v, n_v), (o, n_o), (gate, n_inner), (up, _), (down, n_d) = block
        normed = rms_norm(x, norms[2 * i], eps)
        query = turn(heads(packed_linear(normed, q, n_q)))
        keys[i][:, :, past:tokens] = turn(heads(packed_linear(normed, k, n_k)))
        values[i][:, :, past:tokens] = heads(packed_linear(normed, v, n_v))
        repeats = query.shape[1] // keys[i].shape[1]
        all_keys = keys[i][:, :, :tokens].repeat_interleave(repeats, 1)
        all_values = values[i][:, :, :tokens].repeat_interleave(repeats, 1)
        scores = (query @ all_keys.mT * scale).masked_fill(hidden, -torch.inf)
        wide = scores.to(torch.promote_types(x.dtype, torch.float32))
        shares = wide.softmax(-1).masked_fill(hidden, 0.0)
        attended = (shares.to(x.dtype) @ all_values).transpose(1, 2).reshape(batch, queries, -1)
        x = packed_linear(attended, o, n_o, residual=x)
        inner = packed_glu(rms_norm(x, norms[2 * i + 1], eps), gate, up, n_inner, activation)
        x = packed_linear(inner, down, n_d, residual=x)
    return rms_norm(x, norms[-1], eps)
