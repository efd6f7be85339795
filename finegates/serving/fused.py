"""What the fused blocks of all architectures share."""

from __future__ import annotations

from typing import ClassVar

from torch import nn


class FusedBlock(nn.Module):
    """A block of transformers whose instance has been given a forward with one native call.

    A subclass inherits from this and from the block's class, so that the instance keeps its
    children, its names in the state dict and what `isinstance` says (transformers finds the blocks
    whose hidden states it records by that). Nothing of transformers is changed: `optimize_for_cpu`
    sets ``__class__`` of the instances of one model, `restore_` sets it back. Whatever the native
    call doesn't serve goes to the block's own forward, over the same packed layers.
    """

    plain: ClassVar[type[nn.Module]]

    @classmethod
    def why_not(cls, block: nn.Module) -> str | None:
        """Return in one line why an instance of ``plain`` can't be fused, or None."""
        raise NotImplementedError
