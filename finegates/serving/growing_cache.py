"""A layer of transformers' dynamic cache that grows in place instead of being copied each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

_LEAST = 128  # tokens of room at the beginning


class _Room:
    """Cached tokens [B, G, T, D] at the beginning of a buffer with room for more.

    Tokens that somebody else made are never written: the first that follow go into a copy.
    """

    def __init__(self, tokens: Tensor | None) -> None:
        self.buffer, self.owned = tokens, False
        self.used = 0 if tokens is None or tokens.numel() == 0 else tokens.shape[-2]

    def tokens(self) -> Tensor | None:
        return self.buffer if self.buffer is None else self.buffer[..., : self.used, :]

    def extend(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return the buffer with room for new tokens of this shape, None where they don't fit."""
        batch, groups, new, head = shape
        needed, buffer = self.used + new, self.buffer
        if self.used == 0:
            buffer = None
        elif buffer is not None:
            kept = (buffer.shape[0], buffer.shape[1], buffer.shape[3])
            if kept != (batch, groups, head) or buffer.dtype != dtype or not buffer.is_cpu:
                return None
            if buffer.shape[2] >= needed and self.owned:
                return buffer
        with torch.inference_mode(False):  # so that later steps may write outside that mode
            grown = torch.empty(batch, groups, max(_LEAST, needed + needed // 2), head, dtype=dtype)
        if buffer is not None:
            grown[:, :, : self.used] = buffer[:, :, : self.used]
        self.buffer, self.owned = grown, True
        return grown


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values [B, G, T, D] as views of buffers with room for more tokens.

    To transformers it is a `DynamicLayer`: reading ``keys`` gives the T cached tokens. Assigning,
    as reordering does, starts from the assigned tensor, copied before it grows; cropping gives the
    room back without a copy, so that tokens read before from a buffer of ours are written over.

    Args:
        layer: the layer to take the place of; its tokens are kept.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = layer.keys, layer.values
        if layer.is_initialized:
            self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True

    @property
    def keys(self) -> Tensor | None:
        """The cached keys [B, G, T, D]."""
        return self._keys.tokens()

    @keys.setter
    def keys(self, tokens: Tensor | None) -> None:
        self._keys = _Room(tokens)

    @property
    def values(self) -> Tensor | None:
        """The cached values [B, G, T, D]."""
        return self._values.tokens()

    @values.setter
    def values(self, tokens: Tensor | None) -> None:
        self._values = _Room(tokens)

    def extend(
        self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """Return buffers with room for new tokens [B, G, S, D], None where they don't fit."""
        keys, values = self._keys.extend(shape, dtype), self._values.extend(shape, dtype)
        if keys is None or values is None or self._keys.used != self._values.used:
            return None
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = dtype, keys.device, True
        return keys, values

    def advance(self, tokens: int) -> None:
        """Count tokens that were written behind the cached ones."""
        self._keys.used += tokens
        self._values.used += tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens behind the cached ones and return all of them."""
        same = key_states.shape == value_states.shape and key_states.dtype == value_states.dtype
        buffers = self.extend(key_states.shape, key_states.dtype) if same else None
        if buffers is None or key_states.requires_grad or value_states.requires_grad:
            updated: tuple[Tensor, Tensor] = super().update(key_states, value_states)
            return updated
        start, new = self.get_seq_length(), key_states.shape[-2]
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : start + new] = states
        self.advance(new)
        return buffers[0][:, :, : start + new], buffers[1][:, :, : start + new]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -``tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # its error
        self.advance(max(tokens_to_remove, -self.get_seq_length()))

    def get_seq_length(self) -> int:
        """Return the number of cached tokens."""
        return self._keys.used
