"""Loads the native module ``finegates._C`` once and keeps the reason when it cannot.

torch comes first: the module links ``libgomp.so.1`` by name and so shares torch's OpenMP pool.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401

_C: ModuleType | None = None
_reason: str | None = None


def _build_note() -> str:
    """Return why setup.py built no extension, as it noted beside this file."""
    try:
        note = Path(__file__).with_name("_native_reason.txt").read_text(encoding="utf-8")
    except OSError:
        return "the package was not installed, or built for another Python"
    return " ".join(note.split())


try:
    _C = import_module("finegates._C")
except ModuleNotFoundError:
    _reason = f"extension not built: {_build_note()}"
except ImportError as error:
    _reason = f"extension not loaded: {' '.join(str(error).split())}"


def available() -> bool:
    """Return whether the native module is loaded."""
    return _C is not None


def reason() -> str | None:
    """Return why the native module is not loaded, in one line, or None when it is."""
    return _reason


def isa() -> str:
    """Return the level of the instruction set in use, such as ``avx512bf16``, or ``none``."""
    return "none" if _C is None else str(_C.isa())


def tune() -> str:
    """Return whose measurements the kernels follow: ``zen4``, ``zen5`` or, unloaded, ``none``."""
    return "none" if _C is None else str(_C.tune())
