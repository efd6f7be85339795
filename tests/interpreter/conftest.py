"""These tests need ``TRITON_INTERPRET=1`` before Triton is imported: a process of their own.

``tests/test_triton_interpreter.py`` starts it, so that a plain ``pytest`` runs them all; by hand:
``TRITON_INTERPRET=1 python -m pytest tests/interpreter``.
"""

from collections.abc import Iterator

import pytest

from finegates import use_backend
from finegates.ops import INTERPRETED

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    """Ask for the kernels under test: the tensors are a CPU's, which native kernels could serve."""
    with use_backend("triton"):
        yield
