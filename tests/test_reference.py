"""The law itself: Philox vectors, gradients by finite differences, and the plain formula."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finegates.ops import reference


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers, as in Salmon et al. 2011, any counter."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_vectors_of_random123(
    counter: list[int], key: list[int], expected: list[int]
) -> None:
    assert philox_by_hand(counter, key) == expected


def test_philox_zero_vector() -> None:
    words = reference.philox(torch.tensor([0]), 1)
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@settings(max_examples=30)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 40))
def test_philox_equals_python_integers(seed: int, count: int) -> None:
    words = torch.stack(reference.philox(torch.tensor([seed]), count))
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for i in range(count):
        assert words[:, i].tolist() == philox_by_hand([i, 0, 0, 0], key)


def test_unit_interval_edges() -> None:
    """As tl.rand: 0 and 2³² - 1 both fold to 0; 2³¹ - 1 and 2³¹ are the largest, below 1."""
    words = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    u = reference._unit_interval(words)
    assert u.dtype == torch.float32
    assert u[0] == u[4] == 0.0
    assert u[2] == u[3] < 1.0
    assert u[1] == pytest.approx(2.0**-31, rel=1e-6)


def test_uniform_and_normal_have_their_laws() -> None:
    u = reference.uniform(torch.tensor([5]), 300_000)
    z = reference.normal(torch.tensor([5]), 300_000)
    assert u.dtype == z.dtype == torch.float32
    assert scipy.stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert z.isfinite().all()


def operands(
    m: tuple[int, ...], n: int, k: int, present: tuple[bool, bool, bool], closed: bool
) -> dict[str, Tensor | None]:
    """fp64 operands with gradients; a closed gate is exactly 0."""
    g = torch.Generator().manual_seed(n * 100 + k)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    b, r, c = leaf(n), leaf(n), leaf(k)
    if closed:
        r[::2], c[::3] = 0.0, 0.0
    named = {"x": leaf(*m, k), "w": leaf(n, k)}
    optional = dict(zip("brc", (b, r, c), strict=True))
    named.update({name: t for (name, t), p in zip(optional.items(), present, strict=True) if p})
    return {name: t.requires_grad_() for name, t in named.items()}


PRESENT = list(itertools.product([False, True], repeat=3))
PRESENT_IDS = ["".join(n for n, p in zip("brc", ps, strict=True) if p) or "none" for ps in PRESENT]


def plain(x: Tensor, w: Tensor, **optional: Tensor) -> Tensor:
    """The formula with nothing clever in it."""
    y = (x * optional["c"] if "c" in optional else x) @ w.t()
    y = y + optional["b"] if "b" in optional else y
    return y * optional["r"] if "r" in optional else y


@pytest.mark.parametrize("present", PRESENT, ids=PRESENT_IDS)
@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_forward_is_the_formula(present: tuple[bool, bool, bool], closed: bool) -> None:
    named: Any = operands((2, 3), 5, 4, present, closed)
    y = reference.gated_linear(**{n: named.get(n) for n in "xwbrc"})
    torch.testing.assert_close(y, plain(**named), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("present", PRESENT, ids=PRESENT_IDS)
@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)], ids=str)
def test_backward_is_autograd_of_the_formula(
    present: tuple[bool, bool, bool], closed: bool, shape: tuple[int, ...]
) -> None:
    named: Any = operands(shape, 7, 5, present, closed)
    y = plain(**named)
    dy = torch.randn(y.shape, dtype=torch.float64)
    expected = dict(zip(named, torch.autograd.grad(y, list(named.values()), dy), strict=True))
    args = {n: named[n].detach() if n in named else None for n in "xwbrc"}
    mask = [n in named for n in "xwbrc"]
    grads = reference.gated_linear_backward(
        dy, **args, y=y.detach(), closed_row_grad=True, mask=mask
    )
    for name, grad in zip("xwbrc", grads, strict=True):
        if name in named:
            torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12)
        else:
            assert grad.numel() == 0


def test_unwanted_closed_row_gradient_is_zero_and_the_rest_unchanged() -> None:
    named: Any = operands((4,), 6, 5, (True, True, True), closed=True)
    args = [named[n].detach() for n in "xwbrc"]
    y, dy = reference.gated_linear(*args), torch.randn(4, 6, dtype=torch.float64)
    full, less = (
        reference.gated_linear_backward(dy, *args, y, wanted, [True] * 5)
        for wanted in (True, False)
    )
    closed = named["r"] == 0
    assert (full[3][closed] != 0).all()
    assert (less[3][closed] == 0).all()
    assert torch.equal(full[3][~closed], less[3][~closed])
    for a, b in zip(full[:3] + full[4:], less[:3] + less[4:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", range(5))
def test_mask_computes_only_what_is_wanted(wanted: int) -> None:
    named: Any = operands((4,), 6, 5, (True, True, True), closed=True)
    args = [named[n].detach() for n in "xwbrc"]
    y, dy = reference.gated_linear(*args), torch.randn(4, 6, dtype=torch.float64)
    full = reference.gated_linear_backward(dy, *args, y, True, [True] * 5)
    one = reference.gated_linear_backward(dy, *args, y, True, [i == wanted for i in range(5)])
    for i, (a, b) in enumerate(zip(one, full, strict=True)):
        assert torch.equal(a, b) if i == wanted else a.numel() == 0


def kept(size: int) -> st.SearchStrategy[list[int] | None]:
    """None, or sorted kept indices, possibly none of them."""
    return st.none() | st.sets(st.integers(0, max(0, size - 1)), max_size=size).map(sorted)


@settings(max_examples=150)
@given(st.data())
def test_pruned_linear_is_a_linear_with_zeros(data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    rows, columns = data.draw(kept(n)), data.draw(kept(k))
    activation = data.draw(st.sampled_from(reference.ACTIVATIONS))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    w, b, x, residual = (
        torch.randn(*size, generator=g, dtype=torch.float64)
        for size in ((n, k), (n,), (*shape, k), (*shape, n))
    )
    with_bias, with_residual = data.draw(st.booleans()), data.draw(st.booleans())
    index = [None if i is None else torch.tensor(i, dtype=torch.int32) for i in (rows, columns)]
    ri = torch.arange(n) if index[0] is None else index[0].long()
    ci = torch.arange(k) if index[1] is None else index[1].long()
    y = reference.pruned_linear(
        x, w[ri][:, ci], b[ri] if with_bias else None, *index, n, activation,
        residual if with_residual else None,
    )  # fmt: skip
    mask = torch.zeros(n, k, dtype=torch.float64)
    mask[ri[:, None], ci] = 1.0
    row_mask = torch.zeros(n, dtype=torch.float64).index_fill(0, ri, 1.0)
    act = {"none": lambda t: t, "gelu": F.gelu, "silu": F.silu, "relu": F.relu}.get(
        activation, lambda t: F.gelu(t, approximate="tanh")
    )
    expected = act(x @ (w * mask).t() + (b * row_mask if with_bias else 0.0))
    expected = expected + residual if with_residual else expected
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    if not with_residual:
        assert (y[..., row_mask == 0] == 0).all()
