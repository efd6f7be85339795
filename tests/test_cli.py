"""The ``finegates`` command: subcommands, help, and one line for what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from finegates import cli
from finegates.cli import main


def test_help_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "finetune" in capsys.readouterr().out
    assert main(["frobnicate"]) == 2
    assert "unknown command 'frobnicate'" in capsys.readouterr().err


def test_info_takes_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--nonsense"]) == 2
    assert capsys.readouterr() == ("", "finegates info: it takes no options, got '--nonsense'\n")
    assert main(["info", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: finegates info\n")
    assert main(["info"]) == 0
    assert "backends" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("wrong:\n   1\t2\n"), "wrong: 1 2"),
        (OSError("gone\n"), "gone"),
        (
            ModuleNotFoundError("No module named 'rich'", name="rich"),
            "No module named 'rich'; pip install 'finegates[hf]' brings what it needs",
        ),
        (
            ImportError("the Trainer\nneeds accelerate"),
            "the Trainer needs accelerate; pip install 'finegates[hf]' brings what it needs",
        ),
    ],
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    message: str,
) -> None:
    def fail(arguments: Sequence[str]) -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "finetune", fail)
    assert main(["finetune"]) == 2
    assert capsys.readouterr().err == f"finegates finetune: {message}\n"


def test_a_broken_package_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: Sequence[str]) -> None:
        raise ModuleNotFoundError("No module named 'finegates.lost'", name="finegates.lost")

    monkeypatch.setitem(cli.COMMANDS, "finetune", fail)
    with pytest.raises(ModuleNotFoundError):
        main(["finetune"])
