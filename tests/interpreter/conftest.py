"""These tests need ``TRITON_INTERPRET=1`` before Triton is imported: a process of their own.

``tests/test_triton_interpreter.py`` starts it, so that a plain ``pytest`` runs them all; by hand:
``TRITON_INTERPRET=1 python -m pytest tests/interpreter``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from finegates import use_backend
from finegates.ops import INTERPRETED
from launches import Launches

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

# Values of a constant with which a kernel has part of the code that it has with any other value.
LESS_CODE: dict[str, tuple[Any, ...]] = {
    "ROW": ("none", "ranking"), "COLUMN": ("none", "ranking"), "NOISE": (False,),
    "DIVIDE_ROW": (False,), "DIVIDE_COLUMN": (False,), "CLOSED_GRAD": (True,),
    "CLOSED_ROW_GRAD": (True,), "ACTIVATION": ("none", "gelu_tanh", "silu", "relu"),
}  # fmt: skip
ELEMENTS = {
    torch.float16: "16", torch.bfloat16: "16", torch.float32: "fp32", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip
_covered: set[Any] = set()


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    """Ask for the kernels under test: the tensors are a CPU's, which native kernels could serve."""
    with use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Note each launch, and look for its form in the table of what is compiled without a GPU."""
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime.interpreter import GridExecutor

    from finegates.kernels import launch
    from finegates.kernels.compile import VARIANTS

    noted, run, choose = Launches(), GridExecutor.__call__, launch.largest_tile
    compiled: dict[Any, list[Any]] = {}
    for variant in VARIANTS:
        compiled.setdefault(variant.kernel.fn, []).append(variant)
    rows: list[str] = []

    def noting(kernel: str, *args: Any) -> Any:
        rows.append(kernel)
        return choose(kernel, *args)

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        row = rows[-1] if "GROUP_M" in given and rows else None
        noted.add(self.fn.__name__.removeprefix("_").removesuffix("_kernel"), given, row)
        if self.fn in compiled:
            form = form_of(given, self.constexprs)
            key = (self.fn, row, *form.items())
            if key not in _covered:
                assert any(serves(variant, form, row) for variant in compiled[self.fn]), key
                _covered.add(key)
        with _disable_current_modes():  # what the interpreter itself does with tensors
            return run(self, *args, **kwargs)

    monkeypatch.setattr(launch, "largest_tile", noting)
    monkeypatch.setattr(GridExecutor, "__call__", checked)
    return noted


def form_of(given: dict[str, Any], constants: Any) -> dict[str, Any]:
    """Return what Triton compiles a launch for: constants, element types, what 16 divides.

    Of the number of tokens it is whether they are few: no variant takes it for a multiple.
    """
    from finegates.kernels.launch import GATHER_ROWS

    form: dict[str, Any] = {}
    for name, value in given.items():
        if name in constants:
            form[name] = value
        elif name == "M":
            form[name] = "few" if value <= GATHER_ROWS else "many"
        elif isinstance(value, Tensor):
            form[name] = (ELEMENTS[value.dtype], value.data_ptr() % 16 == 0)
        elif name.endswith("_ptr"):
            form[name] = None
        elif isinstance(value, int):
            form[name] = "one" if value == 1 else "multiple" if value % 16 == 0 else "any"
    return form


def serves(variant: Any, form: dict[str, Any], row: str | None) -> bool:
    """Return whether a variant has all the code of a form, and takes nothing else for granted.

    In whatever dtype its operands are: every row of the launch table is compiled in all three.
    """
    if variant.row != row or variant.few and form["M"] != "few":
        return False
    return all(_fits(variant, name, value) for name, value in form.items())


def _fits(variant: Any, name: str, value: Any) -> bool:
    if name.endswith("_ptr"):
        if value is None:
            return True
        element, whole = value
        types = [variant.operands(dtype).get(name) for dtype in ("bf16", "fp32")]
        elements = {"16" if kind == "bf16" else kind for kind in types}
        return element in elements and (whole or variant.odd)
    if name.startswith(("BLOCK", "STEPS", "GROUP")):  # the interpreter has tiles of its own
        return isinstance(variant.table, str) or variant.table[name] == value
    if name not in variant.constants:
        return name not in variant.multiples or value == "multiple"
    wanted = variant.constants[name]
    if name.startswith("stride"):
        return value == "one"
    return value == wanted or value in LESS_CODE.get(name, ())
