"""Builds and runs tests/native_fuzz.cpp: the native core without Python, here and under qemu."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ["generic", "avx2", "avx512", "avx512bf16"]


def build(folder: Path, machine: str, cxxflags: str = "-O1", **environment: str) -> Path:
    command = [sys.executable, "setup.py", "-q", "build_fuzz"]
    run = subprocess.run(
        [*command, "--folder", str(folder), "--machine", machine],
        cwd=ROOT,
        env={**os.environ, "CXXFLAGS": cxxflags, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / "native_fuzz"


def fuzz(*command: str, level: str = "", tune: str = "") -> str:
    run = subprocess.run(
        [*command, "2", "1"],
        env={**os.environ, "FINEGATES_MAX_ISA": level, "FINEGATES_TUNE": tune},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("optimisation", ["-O0", "-O1"])
def test_every_level(tmp_path: Path, optimisation: str) -> None:
    # A blank and a colon in the path, as in a user's home.
    folder = tmp_path / "build folder: native"
    program = build(folder, "x86_64", optimisation)
    # A weak symbol from a file with its own flags could serve everybody.
    objects = list(folder.glob("kernel_*.o"))
    assert len(objects) == len(LEVELS)
    for path in objects:
        symbols = subprocess.check_output(["nm", "-g", "--defined-only", path], text=True)
        assert len(symbols.splitlines()) == 1, symbols
    best = LEVELS.index(fuzz(str(program)).split()[-1])
    for i, level in enumerate(LEVELS):
        assert fuzz(str(program), level=level).endswith(f" on {LEVELS[min(i, best)]}\n")
    for tune in ("zen4", "zen5"):
        assert fuzz(str(program), tune=tune).endswith(f" on {LEVELS[best]}\n")


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64",
)
def test_neon_under_qemu(tmp_path: Path) -> None:
    program = build(tmp_path, "aarch64", CXX="aarch64-linux-gnu-g++", LDFLAGS="-static")
    assert "on neon" in fuzz("qemu-aarch64", str(program))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_touching_one_level_recompiles_one_file(tmp_path: Path) -> None:
    """What ninja is there for."""
    build(tmp_path, platform.machine())
    objects = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.o")}
    source = ROOT / "csrc" / "kernel_generic.cpp"
    source.touch()
    build(tmp_path, platform.machine())
    changed = [p.name for p in tmp_path.glob("*.o") if p.stat().st_mtime_ns != objects[p.name]]
    assert changed == ["kernel_generic.o"]
