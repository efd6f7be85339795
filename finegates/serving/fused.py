"""What the fused blocks of all architectures share."""

from __future__ import annotations

from operator import is_
from typing import Any, ClassVar

import torch
from torch import nn

# transformers leaves hooks in every model that was asked for hidden states once; they record
# nothing else, and what asks for them takes the plain way.
_RECORDER = "transformers.utils.output_capturing"


class Bound:
    """What a block was found to hold, and how to see that it holds something else now.

    Modules, parameters and buffers are compared one by one with those of the beginning, parameters
    by address as well, since ``.to()`` gives them other memory.

    Args:
        block: the block.
        parts: what its native call reads, None where it can't be one call.
    """

    def __init__(self, block: nn.Module, parts: Any) -> None:
        self.parts = parts
        entries: list[tuple[dict[str, Any], str, Any]] = [
            (table, name, value)
            for module in block.modules()
            for table in (module._modules, module._parameters, module._buffers)
            for name, value in table.items()
        ]
        self._tables = [table for table, _, _ in entries]
        self._names = [name for _, name, _ in entries]
        self._values = [value for _, _, value in entries]
        self._parameters = list(block.parameters())
        self._addresses = [p.data_ptr() for p in self._parameters]

    def holds(self) -> bool:
        """Return whether the block still has every module, parameter and buffer."""
        return all(map(is_, map(dict.get, self._tables, self._names), self._values)) and (
            [p.data_ptr() for p in self._parameters] == self._addresses
        )


class FusedBlock(nn.Module):
    """A block of transformers whose instance has been given a forward with one native call.

    A subclass inherits from this and from the block's class, so that the instance keeps its
    children, its names in the state dict and what `isinstance` says (transformers finds the blocks
    whose hidden states it records by that). Nothing of transformers is changed: `optimize_for_cpu`
    sets ``__class__`` of the instances of one model, `restore_` sets it back. Whatever the native
    call doesn't serve goes to the block's own forward, over the same packed layers.
    """

    plain: ClassVar[type[nn.Module]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "plain" in cls.__dict__:
            # transformers writes a model's class into its config by this name.
            cls.__name__ = cls.plain.__name__

    @classmethod
    def why_not(cls, block: nn.Module) -> str | None:
        """Return in one line why an instance of ``plain`` can't be fused, or None."""
        raise NotImplementedError

    @classmethod
    def take(cls, block: nn.Module) -> None:
        """Fuse an instance of ``plain`` in place."""
        block.__class__ = cls
        block.__dict__["_bound"] = Bound(block, cls.bind(block))

    @classmethod
    def bind(cls, block: nn.Module) -> Any:
        """Return what the forward reads at each call: finding modules by name takes longer."""
        raise NotImplementedError

    def parts(self) -> Any:
        """Return what `bind` found, found again once the block has changed.

        None where the block can't be fused any more. torch.compile guards what it reads itself.

        Raises:
            RuntimeError: the block is in training mode, after a `train` that was refused.
        """
        if self.training:
            raise RuntimeError(
                "a fused block can't train; call eval() or finegates.restore_(model)"
            )
        bound: Bound = self.__dict__["_bound"]
        if not torch.compiler.is_compiling() and not bound.holds():
            bound = Bound(self, self.bind(self) if self.why_not(self) is None else None)
            self.__dict__["_bound"] = bound
        return bound.parts

    def stages(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return what `_cpu_blocks.timed_stages` times of a call, in order.

        Each is ``"linear"`` with the names of its Linears, ``"attention"`` or ``"norm"``. There are
        none where the native call doesn't time itself.
        """
        return []

    def release(self) -> None:
        """Make it an instance of ``plain`` again."""
        del self.__dict__["_bound"]
        self.__class__ = self.plain  # type: ignore[assignment]


def hooked(*roots: nn.Module) -> str | None:
    """Return the class of a module in these that has hooks, which a native call would skip."""
    for root in roots:
        for module in root.modules():
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                if getattr(hook, "__module__", None) != _RECORDER:
                    return type(module).__name__
    return None
