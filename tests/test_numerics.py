"""The tolerance rule and the poisoning, which every other test trusts."""

from __future__ import annotations

import pytest
import torch

from numerics import assert_models_no_worse, assert_no_worse, relative_difference


def test_rule_takes_twice_the_plain_error_and_no_more() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = torch.tensor([1.0, 2.0 + 1e-3])
    assert_no_worse(torch.tensor([1.0 + 1.9e-3, 2.0]), plain, exact)
    with pytest.raises(AssertionError, match="above the allowed"):
        assert_no_worse(torch.tensor([1.0 + 2.1e-3, 2.0]), plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rule_leaves_one_rounding_when_plain_is_exact(dtype: torch.dtype) -> None:
    exact = torch.tensor([1.0], dtype=torch.float64)
    plain = exact.to(dtype)
    eps = torch.finfo(dtype).eps
    assert_no_worse(plain + eps, plain, exact)
    with pytest.raises(AssertionError, match="above the allowed"):
        assert_no_worse(plain + 2 * eps, plain, exact)


def test_rule_counts_the_roundings_of_a_sum_that_plain_forms_otherwise() -> None:
    exact = torch.tensor([1.0], dtype=torch.float64)
    plain, eps = exact.float(), torch.finfo(torch.float32).eps
    assert_no_worse(plain + 40 * eps, plain, exact, magnitude=39.0)
    with pytest.raises(AssertionError, match="above the allowed"):
        assert_no_worse(plain + 41 * eps, plain, exact, magnitude=39.0)


def test_sums_of_products_err_as_derived() -> None:
    """0.64 u Σ|products| for products of mean 0 added one after the other, for any number."""
    for n in (64, 1024):
        products = torch.randn(n, 2000) * torch.randn(n, 2000)
        total = torch.zeros(2000)
        for product in products:
            total += product
        error = (total.double() - products.double().sum(0)).square().mean().sqrt()
        u = torch.finfo(torch.float32).eps / 2
        assert 0.3 < error / (u * products.abs().sum(0).mean()) < 0.64


def test_rule_moves_with_an_operand_that_is_stored() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain, stored = exact.float(), exact + 1e-3
    assert_no_worse(plain + 1e-3, plain, exact, stored=stored)
    with pytest.raises(AssertionError, match="above the allowed"):
        assert_no_worse(plain + 1.1e-3, plain, exact, stored=stored)


def test_rule_of_models_takes_twice_the_plain_mean_and_no_more() -> None:
    exact = [torch.randn(3, 40, dtype=torch.float64) for _ in range(2)]
    noise = [1e-4 * torch.randn(3, 40) for _ in range(2)]
    plain = [(t + n).float() for t, n in zip(exact, noise, strict=True)]
    for factor, passes in ((-1.95, True), (1.95, True), (2.05, False), (float("nan"), False)):
        ours = [(t + factor * n).float() for t, n in zip(exact, noise, strict=True)]
        if passes:
            assert_models_no_worse(ours, plain, exact)
            continue
        with pytest.raises(AssertionError, match="above the allowed"):
            assert_models_no_worse(ours, plain, exact)
    plain[1][0, 0] += 0.01  # one wrong output of 240
    with pytest.raises(AssertionError, match="above the allowed"):
        assert_models_no_worse(plain, [plain[0], (exact[1] + noise[1]).float()], exact)


def test_rule_refuses_nan_and_another_dtype() -> None:
    exact = torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="above the allowed"):
        assert_no_worse(torch.tensor([1.0, torch.nan]), torch.ones(2), exact)
    with pytest.raises(AssertionError, match="dtype"):
        assert_no_worse(torch.ones(2), torch.ones(2, dtype=torch.bfloat16), exact)
    assert not relative_difference(torch.tensor([torch.nan]), torch.ones(1)) <= 1.0


def test_uninitialised_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(2)).isnan().all()
    assert torch.ones(1).new_empty(2, 2).isnan().all()
    assert (torch.empty(2, dtype=torch.int32) == 2**31 - 1).all()
    assert torch.empty(2, device="meta").shape == (2,)
