"""What runs here, and why what doesn't run doesn't; plain text."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, _env, _native, ops
from .report import cpu_name

Fact = tuple[str, Callable[[], str]]


def diagnosis() -> str:
    """Return the report as text; a part that can't be found out says so instead of raising."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    facts: tuple[Fact, ...] = (
        ("finegates", lambda: f"{__version__} ({os.path.dirname(__file__)})"),
        ("python", lambda: f"{platform.python_version()} on {platform.platform()}"),
        ("torch", lambda: f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("transformers", lambda: _version("transformers")),
        ("cpu", lambda: f"{cpu_name()}, {os.cpu_count()} logical cores"),
        ("torch's ISA", torch.backends.cpu.get_cpu_capability),
        ("gpu", _gpu),
        ("native", _native_state),
        ("triton", _triton_state),
    )
    # The settings of ENV.md as they hold now; FINEGATES_NO_NATIVE is read by setup.py only.
    settings: tuple[Fact, ...] = (
        ("  FINEGATES_BACKEND", _env.backend),
        ("  FINEGATES_MAX_ISA", lambda: _env.max_isa() or "no cap"),
        ("  FINEGATES_TUNE", lambda: _env.tune() or "the CPU's own"),
        ("  FINEGATES_LOG", lambda: "on" if _env.log_dispatch() else "off"),
        ("  FINEGATES_CACHE", _env.cache_dir),
    )
    yield from _aligned([(name, _safely(fact)) for name, fact in facts])
    yield ""
    yield "backends, the first that is ready and fits the call serves it"
    yield from _aligned(_backends())
    yield ""
    yield "settings"
    yield from _aligned([(name, _safely(value)) for name, value in settings])


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()


def _safely(fact: Callable[[], str]) -> str:
    try:
        return fact()
    except Exception as error:  # a diagnosis must survive what it diagnoses
        return " ".join(f"{type(error).__name__}: {error}".split())


def _backends() -> list[tuple[str, ...]]:
    try:
        return [(f"  {op}", name, reason or "ready") for op, name, reason in ops.table()]
    except Exception as error:
        return [("  unknown", f"{type(error).__name__}: {error}")]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _native_state() -> str:
    if _native.available():
        return f"loaded, level {_native.isa()}, tuned for {_native.tune()}"
    return str(_native.reason())


def _triton_state() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    interpreted = ", interpreted (TRITON_INTERPRET=1)" if _env.triton_interpret() else ""
    return f"{_version('triton')}{interpreted}"


def main() -> None:
    """Write the diagnosis to standard output."""
    sys.stdout.write(diagnosis())
