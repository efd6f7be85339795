"""Eager inference on the CPU without the op, which costs 10 µs a call where a module costs 6.

The op stays the one definition; this is the shortest way to the same kernel for the common case.
The times are `bench/bench_overhead.py`'s, see docs/native.md.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from .. import _native
from . import _cpu, dispatch, packing
from .checks import transforms_run

_TYPES = (torch.float32, torch.bfloat16)
_CLASSES = (Tensor, nn.Parameter)
# By one lookup and without a wrapper: 0.1 µs a call less.
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_autocasts = torch.is_autocast_enabled


def is_plain(x: Tensor, types: Container[torch.dtype] = _TYPES) -> bool:
    """Return whether the native kernels may take x without asking the dispatcher.

    That is: a plain CPU tensor of these types, fp32 or bf16 unless said otherwise, and no autocast,
    tracing, torch.func, forward-mode AD, named backend or log. Whether a gradient is wanted is for
    the caller to see.
    """
    return not (
        _is_compiling()
        or type(x) is not Tensor
        or not x.is_cpu
        or x.dtype not in types
        or x.is_neg()
        or transforms_run()
        or _is_tracing()
        or _native._C is None
        or _autocasts("cpu")
        or not dispatch.is_free()
    )


class EagerLinear:
    """Calls the native kernel for one layer, and keeps what the layer's operands were packed to."""

    __slots__ = ("_entry",)

    def __init__(self) -> None:
        self._entry: packing.Entry | None = None

    def __deepcopy__(self, memo: object) -> EagerLinear:
        return EagerLinear()

    def __reduce__(self) -> tuple[type[EagerLinear], tuple[()]]:
        return EagerLinear, ()

    def run(
        self,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
        out_features: int,
        activation: str,
    ) -> Tensor | None:
        """Return `pruned_linear`'s result, or None where the op has to decide.

        That is: x is not plain, gradients are wanted, or the weight has another dtype or was made
        in inference mode. The pack is let go then: whatever moved or replaced the weight, the old
        one isn't kept for good.
        """
        if (
            not is_plain(x)
            or type(w) not in _CLASSES
            or w.dtype is not x.dtype
            or torch.is_grad_enabled()
            and (x.requires_grad or w.requires_grad or b is not None and b.requires_grad)
            or w.is_inference()
        ):
            if not _is_compiling():  # a graph would keep the write
                self._entry = None
            return None
        entry = self._entry
        in_features = x.shape[-1]
        if entry is None or entry.state != packing.state(
            w, b, rows, columns, out_features, in_features
        ):
            if not w.is_cpu or dispatch.native_operands_why_not(w, b, rows, columns) is not None:
                self._entry = None
                return None
            entry = packing.entry(w, b, rows, columns, out_features, in_features)
            self._entry = entry
        return _cpu.pruned_linear(x, entry.packed, out_features, activation)

    def forget(self, w: Tensor) -> None:
        """Let go of the layer's pack, and of the one that the op keeps for ``w``."""
        self._entry = None
        packing.forget(w)
