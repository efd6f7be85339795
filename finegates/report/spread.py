"""Scores of repeated runs: mean and spread over seeds, at each setting's best learning rate."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_NOT_SETTINGS = ("seed", "learning_rate")


def spread_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of results, one row per setting.

    A row shows the learning rate with the best mean score, the mean ± sample standard deviation
    over its seeds and their number; beside it the other rates that were tried.

    Args:
        lines: of ``finegates compare``: each has ``run`` (a flat dict), ``scores`` (the deciding
            one first) and ``removed``.
    """
    settings: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    plain = _shared([line["run"] for line in lines])
    for line in lines:
        run = line["run"]
        rates = settings.setdefault(_label(run, plain), {})
        rates.setdefault(run["learning_rate"], []).append(line)
    rows = ["| setting | removed | score | rate | other rates |", "|---|---|---|---|---|"]
    for label, rates in settings.items():
        best = max(rates, key=lambda rate: statistics.mean(map(_score, rates[rate])))
        removed = statistics.mean(line["removed"] for line in rates[best])
        others = "; ".join(
            f"{rate:g}: {_spread(found)}" for rate, found in sorted(rates.items()) if rate != best
        )
        cells = (label, f"{100 * removed:.1f} %", _spread(rates[best]), f"{best:g}", others)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _score(line: Mapping[str, Any]) -> float:
    score: float = next(iter(line["scores"].values()))
    return score


def _spread(lines: Sequence[Mapping[str, Any]]) -> str:
    found = [100 * _score(line) for line in lines]
    if len(found) == 1:
        return f"{found[0]:.1f} (1)"
    return f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f} ({len(found)})"


def _shared(runs: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the keys that have one value in all runs."""
    return {
        key
        for key in {key for run in runs for key in run}
        if len({repr(run.get(key)) for run in runs}) == 1
    }


def _label(run: Mapping[str, Any], plain: set[str]) -> str:
    settings = [
        f"{key} {value}"
        for key, value in run.items()
        if key not in (*plain, *_NOT_SETTINGS, "method")
    ]
    return ", ".join([run["method"], *settings])
