"""bench/loops.py counts what a turn of a kernel's inner loop has, and nothing beside it."""

from __future__ import annotations

from pathlib import Path

import loops
import pytest

LISTING = """
0 <void finegates::(anonymous namespace)::tile<(finegates::Kind)0, 1, 1, 2, true>(TileArgs const&)>:
   0:\tvmovups (%rsi),%zmm1
   6:\tjle    30 <tail>
   8:\tvmovups (%rsi),%zmm1
   e:\tvfmadd231ps (%rdx){1to16},%zmm1,%zmm2
  14:\tvfmadd231ps %zmm1,%zmm4,%zmm3
  1a:\tvmovups 0x40(%rsp),%zmm5
  20:\tprefetcht0 0x1000(%rsi)
  26:\tlea    0x80(%rsi),%rsi
  2a:\tjg     8 <loop>
  30:\tvfmadd231ps %zmm1,%zmm4,%zmm3
"""


def test_a_turn_is_told_from_what_is_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops.subprocess, "check_output", lambda *_, **__: LISTING)
    (key, lines), *others = loops.disassemble(Path("object")).items()
    assert (key, others) == ((0, 1, 1, 2, True), [])
    run = loops.turn(lines, 2)
    assert loops.count(run) == {
        "all": 7, "products": 2, "loads": 3, "stack": 1, "prefetches": 1, "other": 2,
    }  # fmt: skip
    assert loops.turn(lines, 3) == []
