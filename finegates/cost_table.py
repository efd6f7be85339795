"""`CostTable`: measured seconds of Linears by kept rows and columns, which a budget can count."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LinearCosts:
    """Seconds of one shape of Linear, w [N, K], with n of its rows and k of its columns kept.

    Args:
        rows, columns: the measured n and k, rising; the last are N and K.
        seconds: one per pair, ``seconds[i][j]`` at ``rows[i]`` and ``columns[j]``; it may not fall
            along either, so that removing more never costs more.

    Raises:
        ValueError: the sizes don't rise from at least 1, or the seconds have another shape, aren't
            finite and above 0, or fall.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            sizes = getattr(self, name)
            if not sizes or any(b <= a for a, b in itertools.pairwise((0, *sizes))):
                raise ValueError(f"{name} must rise from at least 1, got {sizes!r}")
        if [len(line) for line in self.seconds] != [len(self.columns)] * len(self.rows):
            raise ValueError(
                f"seconds must be {len(self.rows)} lines of {len(self.columns)}, got "
                f"{[len(line) for line in self.seconds]}"
            )
        for line in (*self.seconds, *zip(*self.seconds, strict=True)):
            if not all(math.isfinite(value) and value > 0.0 for value in line):
                raise ValueError(f"seconds must be finite and above 0, got {line!r}")
            if any(b < a for a, b in itertools.pairwise(line)):
                raise ValueError(f"seconds must not fall with more rows or columns, got {line!r}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.rows[-1], self.columns[-1]

    def at(self, rows: int, columns: int) -> float:
        """Return the seconds with this many rows and columns kept: bilinear, 0 at 0.

        Raises:
            ValueError: a number is below 0 or above the shape's.
        """
        n, k = self.shape
        if not (0 <= rows <= n and 0 <= columns <= k):
            raise ValueError(f"rows, columns must be within {n}, {k}, got {rows}, {columns}")
        if rows == 0 or columns == 0:
            return 0.0
        i, down = _place(self.rows, rows)
        j, right = _place(self.columns, columns)
        above, below = (
            (1.0 - right) * self._known(line, j - 1) + right * self._known(line, j)
            for line in (i - 1, i)
        )
        return (1.0 - down) * above + down * below

    def _known(self, i: int, j: int) -> float:
        return 0.0 if i < 0 or j < 0 else self.seconds[i][j]


def _place(sizes: Sequence[int], size: int) -> tuple[int, float]:
    """Return the first measured size that is no smaller, and how far on the way to it this is."""
    at = bisect_left(sizes, size)
    before = sizes[at - 1] if at else 0
    return at, (size - before) / (sizes[at] - before)


@dataclass(frozen=True)
class CostTable:
    """Seconds of every shape of Linear that is gated, as one machine took them.

    A layer's seconds are those of its products alone, gather and scatter included; what lies
    between the Linears isn't in it. `finegates.report.measure_costs` takes one.

    Args:
        tokens: rows M of the input that the seconds are for.
        threads: of the CPU kernels.
        linears: one per shape.

    Raises:
        ValueError: a number is below 1, or a shape appears twice.

    Example:
        >>> table = CostTable(1, 1, (LinearCosts((2, 4), (4,), ((1.0,), (3.0,))),))
        >>> table.seconds((4, 4), rows=3, columns=4)
        2.0
    """

    tokens: int
    threads: int
    linears: tuple[LinearCosts, ...]

    def __post_init__(self) -> None:
        for name in ("tokens", "threads"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
        shapes = [costs.shape for costs in self.linears]
        if len(set(shapes)) < len(shapes):
            raise ValueError(f"linears must have one entry for each shape, got {shapes}")

    def seconds(self, shape: tuple[int, int], rows: int, columns: int) -> float:
        """Return the seconds of a Linear of this shape with so many rows and columns kept.

        Raises:
            ValueError: the table has no such shape, or a number is out of its range.
        """
        for costs in self.linears:
            if costs.shape == shape:
                return costs.at(rows, columns)
        raise ValueError(
            f"costs have no Linear of shape {list(shape)}, only "
            f"{[list(costs.shape) for costs in self.linears]}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CostTable:
        """Build a table from `to_dict`'s output, read from JSON or not.

        Raises:
            ValueError: ``values`` has another form, or a number is out of its range.
        """
        try:
            linears = tuple(
                LinearCosts(
                    tuple(costs["rows"]),
                    tuple(costs["columns"]),
                    tuple(tuple(line) for line in costs["seconds"]),
                )
                for costs in values["linears"]
            )
            return cls(values["tokens"], values["threads"], linears)
        except (KeyError, TypeError) as error:
            raise ValueError(f"costs don't have a CostTable's form: {error!r}") from None
