"""Every example in the docstrings, the README and the docs runs."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

import finegates

ROOT = Path(__file__).parents[1]
NAMES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "finegates").rglob("*.py")
    if "kernels" not in path.parts
)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run(test: doctest.DocTest) -> None:
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    runner.run(test, out=output.append, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0, "".join(output)


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("name", NAMES)
def test_docstrings(name: str) -> None:
    module = load(name)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        run(test)


def test_public_names_are_documented_with_an_example() -> None:
    assert sorted(finegates.__all__) == finegates.__all__
    assert {"FusedGatedLinear", "GateConfig", "gate_", "prune_"} <= set(finegates.__all__)
    for name in finegates.__all__:
        assert getattr(finegates, name).__doc__, f"{name} has no docstring"
    for name in ("FusedGatedLinear", "GateConfig", "PrunedLinear", "use_backend"):
        assert ">>> " in getattr(finegates, name).__doc__, f"{name} has no example"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python blocks run one after another; those with prompts are doctests."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    names: dict[str, object] = {}
    for number, match in enumerate(re.finditer(r"```python\n(.*?)```", text, re.DOTALL)):
        line = text[: match.start(1)].count("\n") + 1
        if ">>>" in match[1]:
            parser = doctest.DocTestParser()
            test = parser.get_doctest(match[1], names, f"{page.name}:{number}", str(page), line)
            run(test)
            names = test.globs
        else:
            exec(compile("\n" * (line - 1) + match[1], str(page), "exec"), names)


def test_readme_shows_the_api() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "```python" in readme
    for word in ("make demo", "make test", "gate_", "prune_"):
        assert word in readme, f"README doesn't mention {word}"
