"""The only reader of environment variables; ENV.md lists them.

``FINEGATES_BACKEND`` and ``FINEGATES_LOG`` are read once, at their first use, because every call of
a layer asks for them; the native module reads ``FINEGATES_MAX_ISA`` and ``FINEGATES_TUNE``
once, when it is loaded.
"""

from __future__ import annotations

import os
from functools import cache

BACKENDS = ("auto", "torch", "native", "triton")


@cache
def backend() -> str:
    """Return ``FINEGATES_BACKEND``: ``auto`` (default), ``torch``, ``native`` or ``triton``.

    Raises:
        ValueError: the variable holds anything else.
    """
    value = os.environ.get("FINEGATES_BACKEND", "auto")
    if value not in BACKENDS:
        raise ValueError(f"FINEGATES_BACKEND must be one of {BACKENDS}, got {value!r}")
    return value


def max_isa() -> str | None:
    """Return ``FINEGATES_MAX_ISA``, the cap on the instruction set, or None when not set."""
    return os.environ.get("FINEGATES_MAX_ISA")


def tune() -> str | None:
    """Return ``FINEGATES_TUNE``: ``zen4``, ``zen5``, or None when not set."""
    return os.environ.get("FINEGATES_TUNE")


@cache
def log_dispatch() -> bool:
    """Return whether ``FINEGATES_LOG`` asks for one line per backend decision."""
    return os.environ.get("FINEGATES_LOG", "0") not in ("", "0")


def triton_interpret() -> bool:
    """Return whether Triton kernels run in the interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def cache_dir() -> str:
    """Return ``FINEGATES_CACHE``, the folder for fetched data (default ``~/.cache/finegates``)."""
    default = os.path.join(os.path.expanduser("~"), ".cache", "finegates")
    return os.environ.get("FINEGATES_CACHE", default)
