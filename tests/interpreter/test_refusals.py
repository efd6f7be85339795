"""What the Triton backend refuses or leaves to others, and the reasons that it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finegates import use_backend
from finegates.kernels import launch
from finegates.ops import (
    _triton,
    _triton_gated,
    gated_linear,
    gated_matmul,
    pruned_linear,
)
from gated_case import make


def test_refusals_have_reasons() -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    for dtype, reason in (
        (torch.bfloat16, "interpreter truncates bfloat16"),
        (torch.float64, "no kernel for torch.float64"),
    ):
        with pytest.raises(ValueError, match=reason):
            gated_linear(x.to(dtype), w.to(dtype), backend="triton")
        with use_backend("auto"):
            gated_linear(x.to(dtype), w.to(dtype))  # falls back
    assert _triton.refusal(x, w.to("meta")) == "operands are on cpu and meta"
    assert _triton.same_dtype(x, w.half()) == "operands are torch.float32 and torch.float16"
    case = make(3, 5, 7)
    constants = (case.config.distribution, case.config.constants)
    args = (case.x, case.w, case.b, case.row_logits, case.column_logits, case.seed, *constants)
    index = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)
    for changes, message in (
        ({"rows": index[:3], "out_features": 5}, "w's rows|must have shape"),
        ({"row_layout": (4, 2)}, "layout of row_logits must tile 5"),
        ({"out_features": 6}, "out_features must fit"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_matmul(*args, **changes)
    for position, value, message in (
        (3, torch.zeros(4), r"row_logits must be fp32 \[5\]"),
        (4, torch.zeros(7, dtype=torch.float64), r"column_logits must be fp32 \[7\]"),
        (5, torch.zeros(1, dtype=torch.int64), r"seed must be int64 \[2\]"),
        (6, "uniform", "distribution must be one of"),
        (2, torch.zeros(4), "b must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_matmul(*args[:position], value, *args[position + 1 :])


def test_pruned_linear_refuses_maps_that_would_write_elsewhere() -> None:
    x, w = torch.randn(2, 3), torch.randn(2, 3)
    for rows in ([0, 5], [-1, 0], [1, 1], [2, 1]):
        with pytest.raises(ValueError, match="rows must be a permutation of 5 features, or some"):
            pruned_linear(x, w, None, torch.tensor(rows, dtype=torch.int32), None, 5)


def test_precision_follows_either_of_torchs_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for allowed in ("tf32", "ieee"):
            matmul.fp32_precision = allowed
            assert _triton.precision(x) == allowed
            assert _triton.precision(x.half()) == "ieee"
        matmul.fp32_precision = before
        torch.set_float32_matmul_precision("high")
        assert _triton.precision(x) == "tf32"
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert _triton.precision(x) == "ieee", "the CDNA table has no tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_sizes_beyond_int32_are_refused_before_launch() -> None:
    """A 2³¹-row x as a stride-0 view: no memory, and no launch."""
    x = torch.zeros(1, 3).expand(2**31, 3)
    reason = _triton_gated.why_not(x, torch.zeros(4, 3), None, None, None)
    assert reason is not None
    assert "a size is above" in reason


@pytest.mark.parametrize("operand", ["x", "w", "dy", "norm_gather's x", "pruned_linear's w"])
def test_columns_that_span_more_than_32_bits_are_refused(operand: str) -> None:
    """The index of a column and its stride are multiplied in 32 bits: strides of no memory."""
    apart = torch.empty(1, device="meta").as_strided((4, 3), (1, 2**30))
    fits = torch.empty(1, device="meta").as_strided((4, 3), (1, launch.MAX_SIZE // 3))
    near = torch.empty(4, 3, device="meta")
    index = torch.empty(2, dtype=torch.int32, device="meta")

    def reason(t: Tensor) -> str | None:
        if operand == "norm_gather's x":
            return _triton.norm_gather_why_not(t, index, None, None)
        if operand == "pruned_linear's w":
            return _triton.pruned_why_not(near, t, None, None, None, 4, "none", None)
        x, w, dy = (t if operand == name else near for name in ("x", "w", "dy"))
        return _triton_gated.backward_why_not(dy, x, w, None)

    refused = reason(apart)
    assert refused is not None
    assert "the last dimension spans more than" in refused
    assert reason(fits) is None


def test_more_outputs_than_int32_counts_are_refused() -> None:
    """A compact weight of few rows may scatter to any number of features."""
    x, w = torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta")
    rows = torch.empty(4, dtype=torch.int32, device="meta")
    reason = _triton.pruned_why_not(x, w, None, rows, None, 2**31, "none", None)
    assert reason == f"a size is above {launch.MAX_SIZE}"
    call = make(1, 1, 1).call()._replace(x=x, w=w, b=None, rows=rows, out_features=2**31)
    assert _triton_gated.fused_why_not(call) == reason


def test_choice_between_fused_and_fold_says_why() -> None:
    def reasons(m: int, n: int, k: int, **changes: Any) -> tuple[str | None, str | None]:
        case = make(1, 1, 1, **changes)
        one = torch.empty(1, 1).half()
        call = case.call()._replace(x=one.expand(m, k), w=one.expand(n, k), b=None)
        return _triton_gated.fused_why_not(call), _triton_gated.fold_why_not(call)

    fused, fold = reasons(16384, 3072, 768)
    assert fold is None
    assert fused is not None
    assert "folding is faster at 16384×3072×768" in fused
    fused, fold = reasons(64, 2048, 8192)
    assert fused is None
    assert fold is not None
    assert "gates in the GEMM are faster at 64×2048×8192" in fold
    fused, fold = reasons(16384, 3072, 768, distribution="ranking", closed_grad=True)
    assert fused is None
    assert fold == "closed gates get a gradient, which a folded weight has lost"
    assert reasons(2048, 33, 16384)[1] is None
    fused, fold = reasons(2048, 32, 16384)
    assert fused is None
    assert fold == "the roundings of 32 folded rows don't average out in columns' gradients"
    fused, fold = reasons(2048, 768, 3072)
    assert fold is None
    fused, fold = reasons(2048, 768, 3072, noise=False)
    assert fused is None
    fused, fold = reasons(16384, 3072, 2**21 - 32 - 3072)
    assert fold is None
    fused, fold = reasons(16384, 3072, 2**21 - 32 - 3071)
    assert fused is None
    assert fold == "rows and columns are above the 2097120 of a folding kernel's grid"
