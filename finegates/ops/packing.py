"""The packed form of a weight for the CPU kernels: made once, kept while nothing has changed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import _cpu


class _Entry(NamedTuple):
    """A packed weight and what it was packed from.

    The sources are aliases that keep their storage alive, so that an address can't come back with
    other contents; with the version counters they tell any change, in place or by replacement.
    """

    sources: tuple[Tensor | None, ...]
    state: tuple[object, ...]
    packed: Tensor


_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed(
    w: Tensor,
    b: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    """Return `_cpu.prepare`'s tensor for these operands, from the cache when they are unchanged.

    The entry lives as long as the tensor ``w``; a change of any operand packs again. Operands made
    in inference mode have no version counter: the caller must not bring them here.

    Raises:
        ValueError: as `_cpu.prepare` does.
    """
    operands = (w, b, rows, columns)
    state = (out_features, in_features, _state(w), _state(b), _state(rows), _state(columns))
    entry: _Entry | None = _entries.get(w)  # type: ignore[no-untyped-call]
    if entry is not None and entry.state == state:
        return entry.packed
    sources = tuple(None if t is None else t.detach() for t in operands)
    made = _cpu.prepare(w, b, rows, columns, out_features, in_features)
    _entries[w] = _Entry(sources, state, made)
    return made


def _state(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor._version)
