"""The environment reader, and that it is the only one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from finegates import _env

ROOT = Path(__file__).parents[1]
VARIABLES = {
    "FINEGATES_BACKEND": _env.backend,
    "FINEGATES_MAX_ISA": _env.max_isa,
    "FINEGATES_TUNE": _env.tune,
    "FINEGATES_LOG": _env.log_dispatch,
    "TRITON_INTERPRET": _env.triton_interpret,
    "FINEGATES_CACHE": _env.cache_dir,
}


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert _env.backend() == "auto"
    assert _env.max_isa() is None
    assert _env.tune() is None
    assert _env.log_dispatch() is False
    assert _env.triton_interpret() is False
    assert _env.cache_dir() == "/home/someone/.cache/finegates"


def test_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    values = ("torch", "avx2", "zen4", "1", "1", "/tmp/cache")
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    read = [read() for read in VARIABLES.values()]
    assert read == ["torch", "avx2", "zen4", True, True, "/tmp/cache"]
    for off in ("0", ""):
        monkeypatch.setenv("FINEGATES_LOG", off)
        _env.log_dispatch.cache_clear()
        assert _env.log_dispatch() is False


def test_bad_backend_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEGATES_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FINEGATES_BACKEND must be one of .* got 'cuda'"):
        _env.backend()


def test_no_other_module_reads_the_environment() -> None:
    for path in sorted((ROOT / "finegates").rglob("*.py")):
        if path.name == "_env.py":
            continue
        tree = ast.parse(path.read_text())
        names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not names & {"environ", "getenv"}, f"{path.relative_to(ROOT)} reads the environment"


def test_every_variable_is_documented() -> None:
    read = set(re.findall(r'"((?:FINEGATES|TRITON)_[A-Z_]+)"', Path(_env.__file__).read_text()))
    assert read == set(VARIABLES)
    ours = {name for name in read if name.startswith("FINEGATES_")}
    documented = set(re.findall(r"FINEGATES_[A-Z]+(?:_[A-Z]+)*", (ROOT / "ENV.md").read_text()))
    assert documented == ours | {"FINEGATES_NO_NATIVE"}
    assert "FINEGATES_NO_NATIVE" in (ROOT / "setup.py").read_text()
