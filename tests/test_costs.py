"""The model of what a gated layer costs on a GPU: the choice it makes, the page that says it."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import gpu_pruned_linear
import pytest

pytest.importorskip("triton")

from finegates.kernels.costs import RATES, Layer, estimate  # noqa: E402, needs triton
from finegates.kernels.launch import FAMILIES  # noqa: E402, needs triton
from finegates.kernels.traffic import filled  # noqa: E402, needs triton

ROOT = Path(__file__).parents[1]
SHAPES = runpy.run_path(str(ROOT / "bench" / "shapes.py"))


def test_the_page_holds_the_predictions_and_marks_what_misses_its_bar() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    for name, (n, k, bias) in SHAPES["GPU_LAYERS"].items():
        bar = SHAPES["GPU_BARS"].get(name.split(".")[0])
        cells = [name, "" if bar is None else f"{bar:.2f}"]
        for m in SHAPES["GPU_TOKENS"]:
            layer = Layer(m, n, k, 2)
            ratio = layer.step() / layer.frozen(bias)
            missed = bar is not None and ratio > bar
            cells.append(f"**{ratio:.2f}**" if missed else f"{ratio:.2f}")
        assert f"| {' | '.join(cells)} |" in page


REMOVED = SHAPES["REMOVED"]


def living(size: int) -> int:
    return round(size * (1.0 - REMOVED) ** 0.5)


def test_the_page_holds_the_predictions_of_compact_steps() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    for name, (n, k, bias) in SHAPES["GPU_LAYERS"].items():
        ratios = [
            layer.compact(living(n), living(k)) / layer.frozen(bias)
            for layer in (Layer(m, n, k, 2) for m in SHAPES["GPU_TOKENS"])
        ]
        assert f"| {name} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |" in page


def test_the_page_holds_the_predictions_of_pruned_inference() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    for name, (n, k, _) in SHAPES["GPU_LAYERS"].items():
        cells = [name]
        for m in SHAPES["GPU_DECODE"]:
            layer = Layer(m, n, k, 2)
            left = (SHAPES["kept"](size, REMOVED) for size in (n, k))
            ratio = layer.dense() / layer.pruned(*left)
            cells.append(f"**{ratio:.2f}**" if ratio < gpu_pruned_linear.BAR else f"{ratio:.2f}")
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize("layer", SHAPES["GPU_LAYERS"])
def test_filling_up_costs_little(layer: str) -> None:
    """Sixteen rows and columns, one more than the most, are below 6 % of a compact step."""
    n, k, _ = SHAPES["GPU_LAYERS"][layer]
    rows, columns = living(n), living(k)
    up = [filled(rows, n), filled(columns, k)]
    assert all(count % 16 == 0 for count in up)
    for m in SHAPES["GPU_TOKENS"]:
        whole = Layer(m, n, k, 2)
        assert whole.compact(rows, columns) == whole.compact(*up)
        assert whole.compact(*up) <= 1.06 * whole.compact(*(count - 16 for count in up))


def test_a_side_that_has_too_few_dead_units_is_not_filled() -> None:
    assert [filled(10, size) for size in (12, 16, 100)] == [10, 16, 16]


# Backward, and with a trained weight.
PASSES = ((False, False), (True, False), (True, True))


def test_every_family_has_rates() -> None:
    assert set(RATES) == set(FAMILIES) - {"interpreter"}


@pytest.mark.parametrize("family", RATES)
def test_folding_wins_forward_where_tokens_are_many(family: str) -> None:
    """And gates in the GEMM where w is large beside x and y, and in backward."""
    for ways in PASSES:
        fused, folded = estimate(64, 4096, 11008, 2, family, *ways)
        assert fused < folded
        fused, folded = estimate(16384, 3072, 768, 2, family, *ways)
        assert (folded < fused) == (ways == (False, False))


@pytest.mark.parametrize("family", RATES)
@pytest.mark.parametrize("size", [2, 4])
def test_few_tokens_are_never_folded(size: int, family: str) -> None:
    """It needs no guard of its own: a launch more and w once more cost more than they can save."""
    sizes = (16, 64, 768, 3072, 16384)
    for m, n, k, ways in itertools.product((1, 8, 64), sizes, sizes, PASSES):
        fused, folded = estimate(m, n, k, size, family, *ways)
        assert fused <= folded, (m, n, k)


def test_training_the_weight_costs_a_gemm_more() -> None:
    layer = Layer(4096, 4096, 4096, 2)
    for frozen, trained in zip(layer.backward(False), layer.backward(True), strict=True):
        assert frozen < trained


def test_only_noise_is_drawn() -> None:
    """By every program of the GEMM for its whole contraction: more than the fold draws."""
    layer = Layer(4096, 4096, 4096, 2)
    still = layer._replace(noise=False)
    fused, folded = (a - b for a, b in zip(layer.forward(), still.forward(), strict=True))
    assert fused > 3 * folded > 0
    assert layer.backward(False) == still.backward(False)
