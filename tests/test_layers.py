"""Imports go down only, from the command line to the environment reader."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "finegates"

# From the top; a module may import from its own entry and from those below.
LAYERS = (
    ("__main__",),
    ("cli", "recipes"),
    ("diagnosis",),
    ("hf", "report"),
    ("export",),
    ("serving",),
    ("surgery",),
    ("nn", "penalty"),
    ("gates", "config"),
    ("cost_table",),
    ("ops",),
    ("_native", "kernels", "_env"),
)
LEVEL = {name: depth for depth, names in enumerate(LAYERS) for name in names}
# The lowest modules are independent of each other, and so are these neighbours.
INDEPENDENT = (("nn", "penalty"), ("hf", "report"), ("_native", "kernels"), ("_env", "kernels"))
CORE = ("_env", "_native", "config", "cost_table", "gates", "penalty", "nn", "ops", "surgery")


def modules() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if "kernels" not in p.parts]


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return what a file imports as dotted names, and whether at import time of the file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = parts if path.name == "__init__.py" else parts[:-1]
    package = tuple(p for p in package if p != "__init__")
    tree = ast.parse(path.read_text())
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [str(node.args[0].value)]
        else:
            continue
        found += [(name, node not in inside) for name in names]
    return found


def part_of(dotted: str) -> str | None:
    """Return the layer's name that a finegates import lands in, None for the package itself."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else None


def part(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    mine = part(path)
    if mine == "__init__":
        return
    assert mine in LEVEL, f"{mine} has no place in the layers: give it one here"
    for name, _ in imports(path):
        if name.split(".")[0] != "finegates":
            continue
        theirs = part_of(name)
        if theirs is None:
            # The package's own names: only the top may use them, and _C belongs to _native.
            top = LEVEL[mine] <= LEVEL["diagnosis"] or (mine, name) == ("_native", "finegates._C")
            assert top, f"{mine} imports {name} from the package's front"
            continue
        assert LEVEL[theirs] >= LEVEL[mine], f"{mine} imports {name} from above"
        pair = {mine, theirs}
        assert not any(pair == set(neighbours) for neighbours in INDEPENDENT), f"{mine} → {theirs}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_core_needs_nothing_but_torch(path: Path) -> None:
    if part(path) not in (*CORE, "__init__"):
        return
    for name, at_import in imports(path):
        top = name.split(".")[0]
        allowed = top in sys.stdlib_module_names or top in ("torch", "finegates", "__future__")
        # A backend's own language may be imported when it is first used.
        assert allowed or (top == "triton" and not at_import), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_know_torch_and_triton_only(path: Path) -> None:
    for name, _ in imports(path):
        top = name.split(".")[0]
        assert top in sys.stdlib_module_names or top in ("torch", "triton", "__future__", "kernels")


def test_csrc_knows_no_torch() -> None:
    sources = sorted((ROOT / "csrc").iterdir())
    assert sources
    for path in sources:
        text = path.read_text()
        for word in ("torch", "ATen", "c10"):
            assert f"#include <{word}" not in text, f"{path.name} includes {word}"


def test_test_can_see_an_upward_import(tmp_path: Path) -> None:
    """The walker itself: relative, absolute and lazy imports are all seen."""
    assert part_of("finegates.surgery.gate_") == "surgery"
    assert part_of("finegates.gate_") is None
    names = dict(imports(PACKAGE / "nn" / "gated_linear.py"))
    assert names["finegates.config.GateConfig"] is True
    assert names["finegates.ops.gated_linear"] is True
    assert dict(imports(PACKAGE / "_native.py"))["finegates._C"] is True
    assert dict(imports(PACKAGE / "ops" / "schema.py"))["finegates.ops.dispatch"] is True


def run(code: str, cwd: Path = ROOT) -> str:
    """Run Python in a fresh process, with warnings as errors."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_lean() -> None:
    """No transformers, no triton, no accelerator query, nothing printed."""
    out = run(
        "import sys, torch; before = set(sys.modules); import finegates;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "bad = new & {'transformers', 'triton', 'datasets', 'rich', 'matplotlib', 'safetensors',"
        " 'scipy', 'sklearn', 'pandas', 'accelerate', 'peft'};"
        "assert not bad, bad; assert not torch.cuda.is_initialized()"
    )
    assert out == ""


@pytest.mark.parametrize("module", ["finegates.report", "finegates.cli", "finegates.__main__"])
def test_command_line_modules_import_alone(module: str) -> None:
    assert run(f"import {module}") == ""
