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
