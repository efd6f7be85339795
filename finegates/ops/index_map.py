"""Index maps: which features the positions of a compact or reordered operand are; offsets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_index_map(name: str, index: Tensor, size: int, device: torch.device) -> None:
    """Check a map into ``size`` features: the kept ones in order, or all of them in any order.

    The values are looked at once for each map and change of it, since a GPU makes the host wait for
    them; not while tracing or capturing a CUDA graph, where nobody can.

    Raises:
        ValueError: another dtype than int32, not 1-D, another device, or a value is out of range,
            repeated or, in a map of fewer than ``size``, out of order.
    """
    _check_form(name, index, torch.int32, device)
    if _unreadable(index) or _is_known(index, size):
        return
    # Of all features a permutation: sorted, it increases as a map of the kept ones does.
    rising = index.sort().values if index.numel() == size else index
    fits = (rising[1:] > rising[:-1]).all() & (rising >= 0).all() & (rising < size).all()
    if not fits:
        raise ValueError(
            f"{name} must be a permutation of {size} features, or some of them in rising order, "
            f"got {index.numel()} that are not"
        )
    trust_index_map(index, size)


def check_offsets(offsets: Tensor, size: int, device: torch.device) -> None:
    """Check where vectors start that lie one after the other in ``size`` elements, and their end.

    The values are looked at as seldom as those of `check_index_map`.

    Raises:
        ValueError: another dtype than int64, not 1-D, another device, or the values don't rise from
            0 to ``size``.
    """
    _check_form("offsets", offsets, torch.int64, device)
    if _unreadable(offsets) or _is_known(offsets, size):
        return
    ends = offsets.new_tensor([0, size])
    if not offsets.numel() or offsets[[0, -1]].ne(ends).any() or offsets.diff().lt(0).any():
        raise ValueError(f"offsets must rise from 0 to {size}, got {offsets.tolist()}")
    trust_index_map(offsets, size)


def trust_index_map(index: Tensor, size: int) -> None:
    """Take a map into ``size`` features, or offsets, for checked as long as they don't change."""
    if not index.is_inference():
        _seen[index] = (size, *_state(index))


def _check_form(name: str, index: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if index.dtype != dtype or index.dim() != 1 or index.device != device:
        raise ValueError(
            f"{name} must be {str(dtype).removeprefix('torch.')} 1-D on {device}, got "
            f"{index.dtype} {tuple(index.shape)} on {index.device}"
        )


def _is_known(index: Tensor, size: int) -> bool:
    if index.is_inference():
        return False
    found = _seen.get(index)  # type: ignore[no-untyped-call]
    return found is not None and found == (size, *_state(index))


def _state(index: Tensor) -> tuple[int, int]:
    return index.data_ptr(), index._version


def _unreadable(index: Tensor) -> bool:
    """Return whether a map has no values here (traced, fake, on meta), or none for the host."""
    return (
        torch.compiler.is_compiling()
        or type(index) not in (Tensor, torch.nn.Parameter)
        or index.is_meta
        or index.is_cuda
        and torch.cuda.is_current_stream_capturing()
    )
