"""``python -m finegates`` tells what runs and why, whatever is broken."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finegates import diagnosis as diagnosing
from finegates import ops

ENV = Path(__file__).parent.parent / "ENV.md"


def test_runs_as_a_module_without_a_word_on_stderr():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "finegates"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert f"torch         {torch.__version__}" in done.stdout
    assert ["pruned_linear", "torch", "ready"] in [
        line.split() for line in done.stdout.splitlines()
    ]


def test_arguments_make_it_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "finegates", "frobnicate"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "finegates: unknown command 'frobnicate'; finegates --help lists them\n"


def test_shows_every_backend_with_its_reason():
    lines = [line.split() for line in diagnosing.diagnosis().splitlines()]
    for op, backend, reason in ops.table():
        assert [op, *backend.split(), *(reason or "ready").split()] in lines


def test_shows_the_settings_in_force(monkeypatch, tmp_path):
    monkeypatch.setenv("FINEGATES_BACKEND", "torch")
    monkeypatch.setenv("FINEGATES_MAX_ISA", "avx2")
    monkeypatch.setenv("FINEGATES_TUNE", "zen4")
    monkeypatch.setenv("FINEGATES_LOG", "1")
    monkeypatch.setenv("FINEGATES_CACHE", str(tmp_path))
    lines = [line.split() for line in diagnosing.diagnosis().splitlines()]
    assert ["FINEGATES_BACKEND", "torch"] in lines
    assert ["FINEGATES_MAX_ISA", "avx2"] in lines
    assert ["FINEGATES_TUNE", "zen4"] in lines
    assert ["FINEGATES_LOG", "on"] in lines
    assert ["FINEGATES_CACHE", str(tmp_path)] in lines


def test_a_wrong_setting_is_named_and_not_raised(monkeypatch):
    monkeypatch.setenv("FINEGATES_BACKEND", "cuda")
    lines = [" ".join(line.split()) for line in diagnosing.diagnosis().splitlines()]
    wrong = "FINEGATES_BACKEND ValueError: FINEGATES_BACKEND must be one of"
    assert any(line.startswith(wrong) for line in lines)


@pytest.mark.parametrize("broken", ["_gpu", "_native_state", "_triton_state", "cpu_name"])
def test_survives_what_is_broken(monkeypatch, broken):
    def fail():
        raise OSError("broken\nbadly")

    monkeypatch.setattr(diagnosing, broken, fail)
    assert "OSError: broken badly" in diagnosing.diagnosis()


def test_survives_a_broken_table(monkeypatch):
    def fail():
        raise OSError("no table")

    monkeypatch.setattr(ops, "table", fail)
    assert "OSError: no table" in diagnosing.diagnosis()


def test_env_md_documents_every_setting_shown():
    text = ENV.read_text(encoding="utf-8")
    shown = [word for word in diagnosing.diagnosis().split() if word.startswith("FINEGATES_")]
    assert len(shown) == 5
    for name in (*shown, "FINEGATES_NO_NATIVE"):
        assert text.count(f"`{name}`") >= 2
