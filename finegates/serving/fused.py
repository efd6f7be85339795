"""What the fused blocks of all architectures share."""

from __future__ import annotations

from typing import Any, ClassVar

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

    @classmethod
    def take(cls, block: nn.Module) -> None:
        """Fuse an instance of ``plain`` in place."""
        block.__class__ = cls
        block.__dict__["_bound"] = cls.bind(block)

    @classmethod
    def bind(cls, block: nn.Module) -> Any:
        """Return what the forward reads at each call: finding modules by name takes longer."""
        raise NotImplementedError

    def release(self) -> None:
        """Make it an instance of ``plain`` again."""
        del self.__dict__["_bound"]
        self.__class__ = self.plain  # type: ignore[assignment]
