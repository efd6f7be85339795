"""What the kernels are tuned for changes no bit of a result (FINEGATES_TUNE)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from finegates import _native

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason()))

# Every number of rows that may meet several panels at once and the two beside them, all pairs of
# types, one layer and two. K in two blocks, 233 rows: seven whole panels and a part of one.
RESULTS = """
import hashlib, torch
from finegates import _native
from finegates.ops import pack, packed_glu, packed_linear
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
rows = torch.randperm(300, generator=g)[:233].sort().values
columns = torch.randperm(1000, generator=g)[:901].sort().values
digest = hashlib.sha256()
for of_weight in (torch.float32, torch.bfloat16, torch.int8):
    gate, up = (
        pack(
            torch.randn(233, 901, generator=g), torch.randn(233, generator=g), rows, columns,
            300, 1000, dtype=of_weight,
        )
        for _ in range(2)
    )
    for of_x in (torch.float32, torch.bfloat16):
        for m in range(1, 9):
            x = torch.randn(m, 1000, generator=g).to(of_x)
            one, two = packed_linear(x, gate, 300), packed_glu(x, gate, up, 300, "silu")
            assert one.isfinite().all() and two.any()
            digest.update(one.view(torch.uint8).numpy().tobytes())
            digest.update(two.view(torch.uint8).numpy().tobytes())
print(_native.tune(), digest.hexdigest())
"""


def run(code: str, tune: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FINEGATES_TUNE": tune},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_results_are_the_same() -> None:
    zen4, zen5, default = (run(RESULTS, tune).split() for tune in ("zen4", "zen5", ""))
    assert zen4 == ["zen4", zen5[1]]
    assert zen5[0] == "zen5"
    assert default in (zen4, zen5)


def test_an_unknown_one_is_the_reason_why_nothing_loads() -> None:
    said = run("from finegates import _native; print(_native.reason())", "z80")
    assert said.endswith("FINEGATES_TUNE must be zen4 or zen5, got z80\n")
