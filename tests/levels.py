"""Runs a test file again for each lower instruction set; ``from levels import ...``."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from finegates import _native

LEVELS = (
    ["generic", "avx2", "avx512", "avx512bf16"]
    if platform.machine() == "x86_64"
    else ["generic", "neon"]
)


def run_capped(file: str, level: str) -> None:
    """Run a test file with the instruction set capped; conftest refuses another level than that."""
    if "FINEGATES_MAX_ISA" in os.environ:
        pytest.skip("this is a forced run already")
    if LEVELS.index(level) >= LEVELS.index(_native.isa()):
        pytest.skip("this level is the one in use, or the CPU lacks it")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file],
        env={**os.environ, "FINEGATES_MAX_ISA": level, "EXPECTED_ISA": level},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-500:]
