"""The packed form of a weight for the CPU kernels: made once, kept while nothing has changed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import _cpu


class Entry(NamedTuple):
    """A packed weight and what it was packed from.

    The sources are aliases that keep their storage alive, so that an address can't come back with
    other contents; with the version counters they tell any change, in place or by replacement.
    """

    sources: tuple[Tensor | None, ...]
    state: tuple[object, ...]
    packed: Tensor


_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def entry(
    w: Tensor,
    b: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    out_features: int,
    in_features: int,
) -> Entry:
    """Return the packed operands, from the cache when they are unchanged.

    An entry lives as long as the tensor ``w``; a change of any operand packs again. Operands made
    in inference mode have no version counter: the caller must not bring them here.

    Raises:
        ValueError: as `_cpu.prepare` does.
    """
    found: Entry | None = _entries.get(w)  # type: ignore[no-untyped-call]
    now = state(w, b, rows, columns, out_features, in_features)
    if found is not None and found.state == now:
        return found
    sources = tuple(None if t is None else t.detach() for t in (w, b, rows, columns))
    made = Entry(sources, now, _cpu.prepare(w, b, rows, columns, out_features, in_features))
    _entries[w] = made
    return made


def state(
    w: Tensor,
    b: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    out_features: int,
    in_features: int,
) -> tuple[object, ...]:
    """Return what changes when an operand does: address and version counter of each, and sizes."""
    return (
        w.data_ptr(),
        w._version,
        b is None or (b.data_ptr(), b._version),
        rows is None or (rows.data_ptr(), rows._version),
        columns is None or (columns.data_ptr(), columns._version),
        out_features,
        in_features,
    )
