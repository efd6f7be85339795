"""What a served model is asked to do: read a batch of prompts, or write one token after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A decode call writes one token; after this many the cache is cut back to where it began.
STRIDE = 16
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Work:
    """One kind of request.

    Args:
        kind: ``"prefill"``, one forward over the prompts, or ``"decode"``, one token after them.
        batch, length: of the prompts, in sequences and tokens.
    """

    kind: str
    batch: int
    length: int

    def __post_init__(self) -> None:
        if self.kind not in ("prefill", "decode"):
            raise ValueError(f"kind must be 'prefill' or 'decode', got {self.kind!r}")
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        """Tokens that a call reads or writes."""
        return self.batch * (self.length if self.kind == "prefill" else 1)

    @property
    def label(self) -> str:
        """The kind with batch and length."""
        return f"{self.kind} {self.batch}×{self.length}"

    def ids(self, vocabulary: int) -> Tensor:
        """Return token ids [batch, length + STRIDE], the same at every call: prompts and more."""
        generator = torch.Generator().manual_seed(self.batch * 8191 + self.length)
        shape = (self.batch, self.length + STRIDE)
        return torch.randint(3, min(vocabulary, 30000), shape, generator=generator)


def is_decoder(model: Any) -> bool:
    """Return whether the model writes tokens."""
    return bool(getattr(model, "can_generate", bool)())


def serve(model: Any, work: Work) -> Call:
    """Return a call that does the work in transformers and returns its logits.

    Prefill gives a decoder's logits at the last position and an encoder's first output (logits or
    the last hidden state) whole. Decode reads the prompts once, here; its calls continue them with
    given tokens, in a cache that is cut back every `STRIDE` tokens.

    Raises:
        ValueError: a decode of a model that doesn't write tokens.
    """
    ids = work.ids(model.config.vocab_size)
    prompt = {"input_ids": ids[:, : work.length]}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    if work.kind == "decode":
        return _decode(model, work, ids)
    if is_decoder(model):
        # As a server does: fill a cache, and score the last position only.
        keep = {"logits_to_keep": 1, "use_cache": True}
        return lambda: model(**prompt, **keep).logits[:, -1]
    return lambda: model(**prompt)[0]


def _decode(model: Any, work: Work, ids: Tensor) -> Call:
    if not is_decoder(model):
        raise ValueError(f"{type(model).__name__} doesn't write tokens")
    cache = model(input_ids=ids[:, : work.length], use_cache=True).past_key_values
    place = work.length

    def step() -> Tensor:
        nonlocal place
        if place == work.length + STRIDE:
            cache.crop(-STRIDE)
            place = work.length
        token = ids[:, place : place + 1]
        place += 1
        y: Tensor = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
        return y

    return step
