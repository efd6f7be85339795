"""Run ``tests/interpreter``, and the GPU's tests dry, with Triton's interpreter switched on.

Each file in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = [*sorted((TESTS / "interpreter").glob("test_*.py")), TESTS / "test_triton_gpu.py"]


# The longest took 253 s of a busy core of a Zen 4.
@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(
        command, env=environment, cwd=path.parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
