"""These tests need ``TRITON_INTERPRET=1`` before Triton is imported: a process of their own.

``tests/test_triton_interpreter.py`` starts it, so that a plain ``pytest`` runs them all; by hand:
``TRITON_INTERPRET=1 python -m pytest tests/interpreter``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from finegates import use_backend
from finegates.ops import INTERPRETED
from launches import Launches

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

# Values of a constant with which a kernel has part of the code that it has with any other value.
LESS: dict[str, tuple[Any, ...]] = {
    "ROW": ("none", "ranking"), "COLUMN": ("none", "ranking"), "NOISE": (False,),
    "DIVIDE_ROW": (False,), "DIVIDE_COLUMN": (False,), "CLOSED_GRAD": (True,),
    "CLOSED_ROW_GRAD": (True,), "ACTIVATION": ("none", "gelu_tanh", "silu", "relu"),
}  # fmt: skip
_covered: set[tuple[Any, ...]] = set()


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

    from finegates.kernels.compile import VARIANTS

    noted, run = Launches(), GridExecutor.__call__
    compiled: dict[Any, list[dict[str, Any]]] = {}
    for variant in VARIANTS:
        compiled.setdefault(variant.kernel.fn, []).append(variant.constants)

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        noted.add(self.fn.__name__.removeprefix("_").removesuffix("_kernel"), given)
        if self.fn in compiled:
            form = {n: given[n] for n in self.constexprs if not n.startswith("BLOCK")}
            form |= {n: t is not None for n, t in given.items() if n.endswith("_ptr")}
            key = (self.fn, *form.items())
            if key not in _covered:
                assert any(covers(constants, form) for constants in compiled[self.fn]), key
                _covered.add(key)
        with _disable_current_modes():  # what the interpreter itself does with tensors
            return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", checked)
    return noted


def covers(constants: dict[str, Any], form: dict[str, Any]) -> bool:
    """Return whether a variant has every operand of a form, and its constants or ones for more."""
    for name, value in form.items():
        if name.endswith("_ptr"):
            fits = not value or name not in constants or constants[name] is not None
        else:
            fits = value == constants.get(name, value) or value in LESS.get(name, ())
        if not fits:
            return False
    return True
