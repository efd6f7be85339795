"""The gated GEMM kernels in Triton's interpreter: forward and every gradient against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gated_case import FOLD, FROZEN, FUSED, NAMES, PRETRAINING, check, make

SHAPES = [(65, 129, 200), (33, 70, 1), (1, 1, 67), (7, 65, 64), (40, 3, 130)]
DTYPES = [torch.float32, torch.float16]
DISTRIBUTIONS = ["gaussian", "hard_concrete", "ranking"]


@pytest.mark.parametrize("mask", [FROZEN, PRETRAINING], ids=["frozen", "pretraining"])
@pytest.mark.parametrize("how", [FUSED, FOLD], ids=["fused", "fold"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(
    shape: Any, dtype: torch.dtype, distribution: str, how: Any, mask: list[bool]
) -> None:
    check(make(*shape, dtype=dtype, distribution=distribution), how, mask)


@pytest.mark.parametrize("mask", [FROZEN, PRETRAINING], ids=["frozen", "pretraining"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
def test_ranking_with_gradients_of_closed_gates(dtype: torch.dtype, mask: list[bool]) -> None:
    check(make(65, 129, 70, dtype, "ranking", closed_grad=True), FUSED, mask)


@pytest.mark.parametrize("how", [FUSED, FOLD], ids=["fused", "fold"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sides", ["r", "c", ""])
def test_one_side_and_no_bias(sides: str, bias: bool, distribution: str, how: Any) -> None:
    case = make(9, 66, 70, distribution=distribution, sides=sides, bias=bias)
    for mask in (FROZEN, PRETRAINING, [False, False, True, True, False], [False] * 5):
        check(case, how, mask)


@pytest.mark.parametrize("how", [FUSED, FOLD], ids=["fused", "fold"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_evaluation_has_no_noise(distribution: str, how: Any) -> None:
    check(make(9, 66, 70, distribution=distribution, noise=False), how, FROZEN)


@pytest.mark.parametrize("how", [FUSED, FOLD], ids=["fused", "fold"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_tied_units_share_logit_and_noise(distribution: str, how: Any) -> None:
    """(groups, repeats · pairs, width) = (2, 6, 10) on rows, (3, 2, 12) on columns."""
    case = make(9, 120, 72, distribution=distribution)
    case.row_layout, case.column_layout = [60, 10], [24, 12]
    assert case.row_logits is not None
    assert case.column_logits is not None
    case.row_logits, case.column_logits = case.row_logits[:20], case.column_logits[:36]
    check(case, how, FROZEN)
    _, r, c = how[0](case.call())
    spread = r.view(2, 6, 10)
    assert torch.equal(spread, spread[:, :1].expand_as(spread))
    assert torch.equal(c.view(3, 2, 12)[:, 0], c.view(3, 2, 12)[:, 1])


@pytest.mark.parametrize("how", [FUSED, FOLD], ids=["fused", "fold"])
@pytest.mark.parametrize("mask", [FROZEN, PRETRAINING], ids=["frozen", "pretraining"])
@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 5, 0), (3, 0, 7), ((2, 0), 5, 7)], ids=str)
def test_empty(shape: Any, mask: list[bool], how: Any) -> None:
    check(make(*shape), how, mask)


@pytest.mark.parametrize("how", [FUSED, FOLD], ids=["fused", "fold"])
@pytest.mark.parametrize("mask", [FROZEN, PRETRAINING], ids=["frozen", "pretraining"])
def test_all_closed_is_zero_even_of_nan(mask: list[bool], how: Any) -> None:
    """No tile is loaded, so that not even NaN and Inf get through."""
    case = make(33, 70, 66)
    for logits in (case.row_logits, case.column_logits):
        assert logits is not None
        logits.fill_(-20.0)
    case.seed = None
    check(case, how, mask)
    y, r, c = how[0](case.call())
    assert not torch.cat((y.flatten(), r, c)).any()
    if how is FUSED:
        case.x.fill_(float("nan"))
        case.w.fill_(float("inf"))
        assert not how[0](case.call())[0].any()


def test_closed_tiles_are_not_loaded() -> None:
    """Columns 64 … 199 and rows 64 … 128 are closed and hold NaN: tiles of 64 never see them."""
    case = make(65, 129, 200, distribution="ranking")
    assert case.row_logits is not None
    assert case.column_logits is not None
    case.row_logits[64:], case.column_logits[64:] = -1.0, -1.0
    clean = FUSED[0](case.call())
    dy = torch.randn(65, 129)
    expected = FUSED[1](case.call(), dy, *clean, FROZEN)
    case.w[64:], case.w[:, 64:], case.x[:, 64:], dy[:, 64:] = (float("nan"),) * 4
    y, r, c = FUSED[0](case.call())
    assert torch.equal(y, clean[0])
    got = FUSED[1](case.call(), dy, y, r, c, FROZEN)
    for name, ours, theirs in zip(NAMES, got, expected, strict=True):
        # The bias' gradient is r Σ dy, where the sum reads every dy.
        live = slice(64) if name == "b" else slice(None)
        assert torch.equal(ours[live], theirs[live]), name


@pytest.mark.parametrize("how", [FUSED, FOLD], ids=["fused", "fold"])
@pytest.mark.parametrize("mask", [FROZEN, PRETRAINING], ids=["frozen", "pretraining"])
def test_non_contiguous(mask: list[bool], how: Any) -> None:
    case = make((4, 9), 66, 70)
    case.x = case.x.transpose(0, 1).contiguous().transpose(0, 1)
    case.w = case.w.t().contiguous().t()
    check(case, how, mask)
    case.x = torch.stack((case.x, case.x), -1)[..., 0]
    check(case, how, mask)
    for name in ("b", "row_logits", "column_logits", "seed"):
        vector = getattr(case, name)
        setattr(case, name, torch.stack((vector, vector), -1)[..., 0])
        assert not getattr(case, name).is_contiguous()
    check(case, how, mask)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_runs_are_bitwise_equal(distribution: str) -> None:
    case = make(65, 129, 70, distribution=distribution)
    for forward, backward in (FUSED, FOLD):
        y, r, c = forward(case.call())
        again = forward(case.call())
        assert all(torch.equal(a, b) for a, b in zip((y, r, c), again, strict=True))
        args = (case.call(), torch.randn_like(y), y, r, c, PRETRAINING)
        first, second = backward(*args), backward(*args)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_logit_gives_nan() -> None:
    for distribution in DISTRIBUTIONS:
        for side in ("row_logits", "column_logits"):
            case = make(5, 66, 70, distribution=distribution)
            getattr(case, side)[3] = float("nan")
            for forward, _ in (FUSED, FOLD):
                y = forward(case.call())[0]
                assert y[:, 3].isnan().all() if side == "row_logits" else y.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("mask", [FROZEN, PRETRAINING], ids=["frozen", "pretraining"])
@pytest.mark.parametrize("kept", ["rows", "columns", "both", "none"])
@pytest.mark.parametrize("m", [5, 65])
def test_compact_weight_of_ranking_gates(
    m: int, kept: str, mask: list[bool], dtype: torch.dtype
) -> None:
    """5 tokens gather in the GEMM's loads, 65 in a pass of their own (`GATHER_ROWS`)."""
    case = make(m, 131, 90, dtype, "ranking")
    assert case.row_logits is not None
    assert case.column_logits is not None
    if kept == "none":
        case.row_logits.fill_(-1.0)
        case.column_logits.fill_(-1.0)
    b = case.b
    assert b is not None
    if kept != "columns":
        case.rows = (case.row_logits > 0).nonzero().squeeze(1).int()
        case.w, case.b = case.w[case.rows.long()], b[case.rows.long()]
    if kept != "rows":
        case.columns = (case.column_logits > 0).nonzero().squeeze(1).int()
        case.w = case.w[:, case.columns.long()]
    check(case, FUSED, mask)


@pytest.mark.parametrize("mask", [FROZEN, PRETRAINING], ids=["frozen", "pretraining"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("m", [5, 65])
def test_order_changes_no_result(m: int, distribution: str, mask: list[bool]) -> None:
    """Closed gates last: the same gates, y and gradients, and NaN in closed tiles stays there."""
    case = make(m, 150, 140, distribution=distribution)
    y, r, c = FUSED[0](case.call())
    dy = torch.randn_like(y)
    grads = FUSED[1](case.call(), dy, y, r, c, mask)
    case.rows, case.columns = closed_last(r), closed_last(c)
    rows, columns = case.rows.long(), case.columns.long()
    assert case.b is not None
    case.w, case.b = case.w[rows][:, columns].contiguous(), case.b[rows]
    check(case, FUSED, mask)
    ordered, same_r, same_c = FUSED[0](case.call())
    assert torch.equal(r, same_r)
    assert torch.equal(c, same_c)
    torch.testing.assert_close(ordered, y, rtol=1e-5, atol=1e-5)
    again = FUSED[1](case.call(), dy, y, r, c, mask)
    expected = [
        grads[0], grads[1][rows][:, columns] if mask[1] else grads[1], grads[2][rows], *grads[3:]
    ]  # fmt: skip
    for name, ours, theirs in zip(NAMES, again, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)
    open_columns = int((c != 0).sum())
    assert open_columns <= 128, "the last tile of columns is closed"
    case.w[:, -(-open_columns // 64) * 64 :] = float("nan")
    assert torch.equal(FUSED[0](case.call())[0], ordered)


def test_strided_maps() -> None:
    case = make(5, 66, 70, distribution="ranking")
    assert case.row_logits is not None
    assert case.column_logits is not None
    assert case.b is not None
    rows, columns = (
        (logits > 0).nonzero().squeeze(1) for logits in (case.row_logits, case.column_logits)
    )
    case.w, case.b = case.w[rows][:, columns], case.b[rows]
    case.rows, case.columns = (torch.stack((i, i), -1).int()[:, 0] for i in (rows, columns))
    check(case, FUSED, PRETRAINING)


def closed_last(gates: Any) -> Any:
    return torch.argsort((gates == 0).int(), stable=True).int()


@settings(max_examples=60)
@given(st.data())
def test_any_shape_and_any_wish(data: st.DataObject) -> None:
    """Sizes around tile edges, any sides, any subset of gradients, both ways."""
    size = st.sampled_from((0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 129))
    m, n, k = (data.draw(size, name) for name in "mnk")
    distribution = data.draw(st.sampled_from(DISTRIBUTIONS))
    how = data.draw(st.sampled_from((FUSED, FOLD)))
    case = make(
        m,
        n,
        k,
        data.draw(st.sampled_from(DTYPES)),
        distribution,
        bias=data.draw(st.booleans()),
        sides=data.draw(st.sampled_from(("rc", "r", "c", ""))),
        noise=data.draw(st.booleans()),
        closed_grad=how is FUSED and distribution == "ranking" and data.draw(st.booleans()),
        spread=data.draw(st.sampled_from((0.0, 0.7, 9.0))),
    )
    check(case, how, data.draw(st.lists(st.booleans(), min_size=5, max_size=5)))
