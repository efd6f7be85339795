"""Costs by kept rows and columns: interpolation by hand, one way on disk, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finegates.cost_table import CostTable, LinearCosts

GRID = LinearCosts((2, 4, 8), (5, 10), ((1.0, 2.0), (2.0, 4.0), (2.0, 6.0)))


@pytest.mark.parametrize(
    ("rows", "columns", "seconds"),
    [
        (8, 10, 6.0),
        (2, 5, 1.0),
        (3, 5, 1.5),
        (6, 10, 5.0),
        (3, 6, 0.8 * 1.5 + 0.2 * 3.0),
        (1, 5, 0.5),
        (1, 1, 0.5 * 0.2 * 1.0),
        (0, 10, 0.0),
        (8, 0, 0.0),
    ],
)
def test_interpolation_by_hand(rows: int, columns: int, seconds: float) -> None:
    assert GRID.at(rows, columns) == pytest.approx(seconds)


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 10), st.integers(0, 10))
def test_less_is_never_dearer(n: int, m: int, k: int, j: int) -> None:
    small, large = (min(n, m), min(k, j)), (max(n, m), max(k, j))
    assert GRID.at(*small) <= GRID.at(*large) * (1 + 1e-12)


def test_round_trip_through_json() -> None:
    table = CostTable(128, 2, (GRID, LinearCosts((1,), (1,), ((0.5,),))))
    assert CostTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert hash(table) == hash(CostTable.from_dict(table.to_dict()))
    assert table.seconds((8, 10), 4, 10) == 4.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": (4, 2, 8)}, r"rows must rise from at least 1, got \(4, 2, 8\)"),
        ({"rows": (0, 4, 8)}, "rows must rise from at least 1"),
        ({"columns": ()}, r"columns must rise from at least 1, got \(\)"),
        ({"columns": (5, 7, 10)}, r"seconds must be 3 lines of 3, got \[2, 2, 2\]"),
        ({"seconds": ((1.0, 2.0), (2.0, 4.0), (1.0, 6.0))}, "seconds must not fall"),
        ({"seconds": ((1.0, 2.0), (2.0, 1.0), (2.0, 6.0))}, "seconds must not fall"),
        ({"seconds": ((0.0, 2.0), (2.0, 4.0), (2.0, 6.0))}, "seconds must be finite and above 0"),
        ({"seconds": ((1.0, 2.0), (2.0, 4.0), (2.0, float("nan")))}, "must be finite and above 0"),
    ],
)
def test_bad_costs_are_named(changes: dict[str, Any], message: str) -> None:
    fields = {"rows": GRID.rows, "columns": GRID.columns, "seconds": GRID.seconds, **changes}
    with pytest.raises(ValueError, match=message):
        LinearCosts(**fields)


def test_bad_tables_are_named() -> None:
    with pytest.raises(ValueError, match="tokens must be a whole number from 1, got 0"):
        CostTable(0, 1, (GRID,))
    with pytest.raises(ValueError, match="one entry for each shape"):
        CostTable(1, 1, (GRID, GRID))
    with pytest.raises(ValueError, match=r"no Linear of shape \[8, 9\], only \[\[8, 10\]\]"):
        CostTable(1, 1, (GRID,)).seconds((8, 9), 1, 1)
    with pytest.raises(ValueError, match="rows, columns must be within 8, 10, got 9, 1"):
        GRID.at(9, 1)
    for values in ({}, {"tokens": 1, "threads": 1, "linears": [{"rows": [1]}]}, {"linears": 3}):
        with pytest.raises(ValueError, match="costs don't have a CostTable's form"):
            CostTable.from_dict(values)
