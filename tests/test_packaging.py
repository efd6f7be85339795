"""What is installed, and that our folders never answer to somebody else's name."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Build inputs only: a copy of the tree must not carry objects, caches or a virtual environment.
SOURCES = ("finegates", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in")
SOURCES += ("README.md", "LICENSE")


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=280,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def test_kernels_is_a_plain_folder_behind_a_link() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "finegates" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"


def test_nothing_of_ours_answers_to_kernels() -> None:
    code = (
        "import importlib.util; spec = importlib.util.find_spec('kernels');"
        "print('' if spec is None else spec.origin)"
    )
    origin = run(sys.executable, "-c", code, cwd=ROOT).strip()
    assert not origin.startswith(str(ROOT))


def test_transformers_imports_from_the_repo_root() -> None:
    """With a regular package named kernels this import raises."""
    code = (
        "import transformers.integrations.hub_kernels, transformers, sys;"
        "from transformers import BertConfig, BertModel;"
        "BertModel(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1,"
        " intermediate_size=8, vocab_size=9));"
        "module = sys.modules.get('kernels');"
        f"assert not str(getattr(module, '__file__', None)).startswith({str(ROOT)!r})"
    )
    run(sys.executable, "-c", code, cwd=ROOT)


def test_no_file_imports_kernels_by_that_name() -> None:
    pattern = re.compile(r"^\s*(from|import)\s+kernels\b", re.MULTILINE)
    for folder in ("finegates", "bench", "tests", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not pattern.search(path.read_text()), path


def test_no_tests_package_and_no_root_conftest() -> None:
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()
    for name in ("numerics", "tiny_models"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin == str(ROOT / "tests" / f"{name}.py"), f"{name} clashes"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the build's inputs, so that the checkout stays as it is."""
    target = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "build")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, target / name, symlinks=True, ignore=ignore)
        elif path.exists():
            shutil.copy2(path, target / name)
    return target


def build_wheel(source: Path, out: Path, **environment: str) -> zipfile.ZipFile:
    run(
        sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation",
        "--disable-pip-version-check", "--quiet", "--wheel-dir", str(out),
        cwd=source, **environment,
    )  # fmt: skip
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module")
def pure_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    with build_wheel(source, tmp_path_factory.mktemp("pure"), FINEGATES_NO_NATIVE="1") as wheel:
        yield wheel


@pytest.mark.slow
def test_wheel_has_one_top_level_name(pure_wheel: zipfile.ZipFile) -> None:
    names = pure_wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"finegates"}
    assert len(tops) == 2
    (top_level,) = (n for n in names if n.endswith("top_level.txt"))
    assert pure_wheel.read(top_level).decode().split() == ["finegates"]


@pytest.mark.slow
def test_wheel_holds_every_module_and_nothing_else(pure_wheel: zipfile.ZipFile) -> None:
    packed = {n for n in pure_wheel.namelist() if n.startswith("finegates/")}
    sources = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "finegates").rglob("*.py")
        if "__pycache__" not in p.parts and "kernels" not in p.parts
    }
    kernels = {f"finegates/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert {n for n in packed if n.endswith(".py")} == sources | kernels
    configs = {f"finegates/recipes/llama/llama_{size}.json" for size in ("9m", "7b")}
    assert configs <= packed
    packed.remove("finegates/_native_reason.txt")
    others = {Path(n).suffix for n in packed} - {".py", ".typed", ".json"}
    assert not others, f"the pure wheel holds {others}"


@pytest.mark.slow
def test_pure_wheel_runs_on_the_reference_and_says_why(
    pure_wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    pure_wheel.extractall(tmp_path / "site")
    # An editable install beside it would offer its own extension as a submodule.
    code = (
        "import sys;"
        "sys.meta_path[:] = [f for f in sys.meta_path"
        " if not getattr(f, '__module__', '').startswith('__editable__')];"
        "import finegates, torch; from finegates.ops import table;"
        "assert finegates.__file__.startswith({site!r}), finegates.__file__;"
        "assert finegates.__version__ == '0.1.0', finegates.__version__;"
        "layer = finegates.PrunedLinear(4, 3, 2, 2); layer(torch.ones(1, 4));"
        "print([why for op, name, why in table() if name == 'native'][0])"
    ).format(site=str(tmp_path / "site"))
    reason = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert reason.strip() == "extension not built: FINEGATES_NO_NATIVE is set"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_native_wheel_loads(source: Path, tmp_path: Path) -> None:
    # Unoptimised: this is about what is built and found, and compiles three times as fast.
    # What an editable install without a compiler left in the tree is not packed.
    (source / "finegates" / "_native_reason.txt").write_text("no C++ compiler found")
    with build_wheel(source, tmp_path / "wheel", CXXFLAGS="-O0") as wheel:
        assert "finegates/_native_reason.txt" not in wheel.namelist()
        (module,) = (n for n in wheel.namelist() if n.endswith(".so"))
        assert module.startswith("finegates/_C.")
        assert {n.split("/")[0] for n in wheel.namelist() if "dist-info" not in n} == {"finegates"}
        wheel.extractall(tmp_path / "site")
    if shutil.which("nm") is not None:
        exported = run("nm", "-D", "--defined-only", str(tmp_path / "site" / module), cwd=tmp_path)
        assert [line.split()[-1] for line in exported.splitlines()] == ["PyInit__C"]
    code = (
        "import torch, finegates; from finegates import _native;"
        "assert _native.available(), _native.reason(); print(_native.__file__)"
    )
    out = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert out.startswith(str(tmp_path / "site"))


def test_version_is_written_once() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert len(re.findall(r'^version = "', text, re.MULTILINE)) == 1
    assert "version=" not in (ROOT / "setup.py").read_text()
