"""Memory that maps a checkpoint's file: handed back once its weights have been packed."""

from __future__ import annotations

import bisect
import ctypes
import mmap
import re

from torch import Tensor

_PAGEOUT = 21  # MADV_PAGEOUT of Linux; Python doesn't name it
_MAPPED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ [1-9]\d* ", re.MULTILINE)


class FilePages:
    """The parts of this process's memory that map a file, as of now.

    ``from_pretrained`` leaves every weight where the file is mapped. One tensor that stays keeps
    the whole map alive, and what was read of the others counts as resident memory of the process.
    """

    def __init__(self) -> None:
        try:
            with open("/proc/self/maps", encoding="utf-8") as lines:
                found = _MAPPED.findall(lines.read())
        except OSError:  # no Linux: nothing is let go
            found = []
        self._begins = [int(begin, 16) for begin, _ in found]
        self._ends = [int(end, 16) for _, end in found]

    def let_go(self, tensor: Tensor) -> None:
        """Tell the system that a tensor won't be read soon, if it lies in a file.

        Its pages leave the process; who reads the tensor nevertheless gets the same values from the
        file again, and pages that were written go to swap or stay. The advice may do nothing.
        """
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        at = bisect.bisect(self._begins, begin) - 1
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        size = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if at >= 0 and end <= self._ends[at] and size > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _PAGEOUT)
