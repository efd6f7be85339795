"""`gated_matmul` on the CPU kernels: forward and every gradient against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finegates import _native, use_backend
from finegates.ops import gated_matmul
from finegates.ops.dispatch import choose
from finegates.ops.gated_call import GatedCall
from numerics import assert_no_worse

pytestmark = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))
N, K = 46, 70
CONSTANTS = (0.0, 1.0, 1.0)
KEPT = {
    "both": (torch.arange(0, N, 2), torch.arange(1, K, 3)),
    "rows": (torch.arange(3, N), None),
    "columns": (None, torch.arange(0, K - 9)),
    "all": (None, None),
    "no row": (torch.arange(0), torch.arange(1, K, 3)),
    "no column": (torch.arange(0, N, 2), torch.arange(0)),
}


def gradients(
    dtype: torch.dtype, kept: str, shape: tuple[int, ...], tied: bool, backend: str
) -> list[Tensor]:
    """Return y and the gradients of x, w, b and the logits, from the same fp32 draws."""
    rows, columns = (None if index is None else index.int() for index in KEPT[kept])
    g = torch.Generator().manual_seed(0)
    # Tied: two heads of a group, two halves of a rotary pair.
    row_units, row_layout = (N // 2, (N, N // 2)) if tied else (N, None)
    logits = [torch.full((units,), -1.0) for units in (row_units, K)]
    unit = torch.arange(N) % (N // 2) if tied else torch.arange(N)
    logits[0][unit if rows is None else unit[rows.long()]] = 1.0
    logits[1][slice(None) if columns is None else columns.long()] = 1.0
    n = N if rows is None else len(rows)
    k = K if columns is None else len(columns)
    leaves = [
        *(torch.randn(*s, generator=g).bfloat16().to(dtype) for s in ((*shape, K), (n, k), (n,))),
        *logits,
    ]
    x, w, b, row, column = (leaf.requires_grad_() for leaf in leaves)
    y = gated_matmul(
        x, w, b, row, column, None, "ranking", CONSTANTS, row_layout=row_layout, rows=rows,
        columns=columns, out_features=N, backend=backend,
    )  # fmt: skip
    y.backward(torch.randn(y.shape, generator=g).bfloat16().to(dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("shape", [(3, 11), (1,), (0,), ()], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_agrees_with_the_reference(
    dtype: torch.dtype, kept: str, shape: tuple[int, ...], tied: bool
) -> None:
    exact = gradients(torch.float64, kept, shape, tied, "torch")
    plain = gradients(dtype, kept, shape, tied, "torch")
    ours = gradients(dtype, kept, shape, tied, "native")
    for a, b, e in zip(ours, plain, exact, strict=True):
        assert_no_worse(a, b, e.double())


def test_unwanted_gradients_are_not_made() -> None:
    x = torch.randn(5, K)
    column = torch.ones(K, requires_grad=True)
    y = gated_matmul(
        x, torch.randn(N, K), None, None, column, None, "ranking", CONSTANTS, backend="native"
    )
    y.sum().backward()
    assert column.grad is not None
    assert column.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"distribution": "gaussian"}, "gaussian gates are not binary"),
        ({"column_logits": torch.tensor([1.0, -1.0])}, "a gate is closed"),
        ({"rows": torch.tensor([1, 0, 2], dtype=torch.int32)}, "the weight is in another order"),
        ({"x": torch.ones(1, 2).double()}, "x is torch.float64"),
    ],
)
def test_says_why_not(change: dict[str, object], reason: str) -> None:
    call = GatedCall(
        torch.ones(1, 2), torch.ones(3, 2), None, torch.ones(3), torch.ones(2), None, None, None,
        3, [3, 3], [2, 2], "ranking", *CONSTANTS, False,
    )  # fmt: skip
    assert choose("gated_matmul", "native", call).backend == "native"
    with pytest.raises(ValueError, match=reason):
        choose("gated_matmul", "native", call._replace(**change))
    with use_backend("torch"):
        assert choose("gated_matmul", "auto", call).backend == "torch"
