"""Run ``tests/interpreter``, and the GPU's tests dry, with Triton's interpreter switched on.

Each file in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from ahead import asked_for

pytest.importorskip("triton")

TESTS = Path(__file__).parent
FILES = [*sorted((TESTS / "interpreter").glob("test_*.py")), TESTS / "test_triton_gpu.py"]

Done = subprocess.CompletedProcess[str]


def interpret(path: Path) -> Done:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    return subprocess.run(
        command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def interpreting(request: pytest.FixtureRequest) -> Iterator[dict[Path, Future[Done]]]:
    """File → its run, of the chosen files, ahead of the tests that ask and a file for each core."""
    pool = ThreadPoolExecutor(os.cpu_count())
    paths = [params["path"] for params in asked_for(request)]
    try:
        yield {path: pool.submit(interpret, path) for path in paths}
    finally:
        pool.shutdown(cancel_futures=True)


# The longest took 253 s of a busy core of a Zen 4.
@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path: Path, interpreting: dict[Path, Future[Done]]) -> None:
    done = interpreting[path].result()
    assert done.returncode == 0, done.stdout + done.stderr
