"""Every Triton kernel on small odd shapes: ``python tests/every_kernel.py`` on a GPU.

compute-sanitizer watches this script instead of the tests, whose fixture fills uninitialised
memory, which initcheck must find as it is; it compares nothing. Operands are made on the CPU, so
that few foreign kernels run between ours. `tests/interpreter/test_every_kernel.py` proves that no
kernel is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from finegates.ops import norm_gather, open_mass, pruned_linear
from gated_case import FOLD, FROZEN, FUSED, PRETRAINING, Case, make

DISTRIBUTIONS = ("gaussian", "hard_concrete", "ranking")


def step(case: Case, how: tuple[Callable[..., Any], ...], mask: list[bool], device: str) -> None:
    """Run one forward and one backward."""
    case = case.to(device)
    y, r, c = how[0](case.call())
    dy = torch.randn(y.shape).to(y)
    how[1](case.call(), dy, y, r, c, mask)


def in_order(case: Case, compact: bool) -> Case:
    """Put the closed gates of a case last, or leave them out."""
    if case.row_logits is None or case.column_logits is None or case.b is None:
        raise ValueError("case must have both gates and a bias")
    sides = []
    for logits in (case.row_logits, case.column_logits):
        shut = logits <= case.config.closing_logit
        order = torch.argsort(shut.int(), stable=True)
        sides.append(order[: int((~shut).sum())] if compact else order)
    rows, columns = sides
    case.w, case.b = case.w[rows][:, columns].contiguous(), case.b[rows]
    case.rows, case.columns = rows.int(), columns.int()
    return case


def train(device: str, dtype: torch.dtype) -> None:
    """Run the gated Linear: each way, mask and distribution, in order, and compact."""
    for mask in (FROZEN, PRETRAINING):
        for distribution in DISTRIBUTIONS:
            for how in (FUSED, FOLD):
                step(make(65, 129, 200, dtype, distribution), how, mask, device)
            ordered = in_order(make(65, 129, 200, dtype, distribution), compact=False)
            step(ordered, FUSED, mask, device)
        step(make(65, 129, 200, dtype, "ranking", closed_grad=True), FUSED, mask, device)
        for m in (5, 65):
            step(in_order(make(m, 129, 200, dtype, "ranking"), True), FUSED, mask, device)


def infer(device: str, dtype: torch.dtype) -> None:
    """Run pruned Linears of few and of many tokens, and each norm."""
    rows, columns = (
        torch.randperm(size)[:count].sort().values.int().to(device)
        for size, count in ((129, 101), (200, 151))
    )
    w, b = torch.randn(101, 151).to(device, dtype), torch.randn(101).to(device, dtype)
    for m in (1, 33, 70):
        x, residual = torch.randn(m, 200).to(device, dtype), torch.randn(m, 129).to(device, dtype)
        for added in (None, residual):
            pruned_linear(
                x, w, b, rows, columns, 129, activation="gelu", residual=added, backend="triton"
            )
    weight, bias = torch.randn(2, 200).to(device, dtype)
    for norm in ("none", "rms", "layer"):
        norm_gather(x, columns, weight, bias, norm=norm, backend="triton")


def penalise(device: str) -> None:
    """Run the penalty of every distribution, forward and backward."""
    offsets = torch.tensor([0, 10, 1500, 2100]).to(device)
    for distribution in DISTRIBUTIONS:
        logits = torch.randn(2100).to(device).requires_grad_()
        open_mass(logits, offsets, distribution, 0.5, 0.5, backend="triton").sum().backward()


def run(device: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Run everything."""
    for dtype in dtypes:
        train(device, dtype)
        infer(device, dtype)
    penalise(device)


if __name__ == "__main__":
    run("cuda", (torch.float32, torch.float16, torch.bfloat16))
    torch.cuda.synchronize()
