"""`PackedEmbedding`: an input embedding that reads its rows from the output layer tied to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import packed_embedding
from .packed_linear import PackedLinear


class PackedEmbedding(nn.Embedding):
    """An `nn.Embedding` without a weight of its own, for inference: y = w[ids], w the head's.

    As with `FusedBlock` an instance of the plain class gets this one as its ``__class__``, so that
    its name, its settings and what `isinstance` says stay.
    """

    _head: PackedLinear  # not a submodule of this one
    _dtype: torch.dtype

    @classmethod
    def take(cls, embedding: nn.Embedding, head: PackedLinear) -> None:
        """Let an embedding read its rows from the packed form of the weight it shared, in place."""
        embedding.__dict__.update(_head=head, _dtype=embedding.weight.dtype)
        del embedding.weight
        embedding.__class__ = cls
        head.tied = True

    def release(self) -> None:
        """Make it an `nn.Embedding` again, with the parameter that the head unpacks to."""
        weight = self._head.unpack().weight
        del self.__dict__["_head"], self.__dict__["_dtype"]
        self.__class__ = nn.Embedding  # type: ignore[assignment]
        self.weight = weight  # type: ignore[misc]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight: a copy made at each access."""
        return self._head.weight

    def forward(self, input: Tensor) -> Tensor:
        """Map ids [...] to rows [..., K].

        Raises:
            IndexError: an id is no row.
        """
        return packed_embedding(input, self._head.packed, self.embedding_dim, self._dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedEmbedding:
        self.__dict__["_dtype"] = fn(torch.empty(0, dtype=self._dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "weight"] = self._head.unpack().weight

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        layer = self._head.unpack()
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, _weight=layer.weight)
        plain._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        layer.weight = plain.weight
        self._head._pack(layer)
