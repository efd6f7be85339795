"""Every Triton kernel, odd and aligned, small and large tiles: run it as a script on a GPU.

compute-sanitizer watches this script instead of the tests, whose fixture fills uninitialised
memory, which initcheck must find as it is; it compares nothing. Operands are made on the CPU, so
that few foreign kernels run between ours. `tests/interpreter/test_every_kernel.py` proves that no
kernel is left out in any of its rows of the launch table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from finegates.kernels import launch
from finegates.ops import norm_gather, open_mass, pruned_linear
from gated_case import FOLD, FROZEN, FUSED, PRETRAINING, Case, in_order, make

DISTRIBUTIONS = ("gaussian", "hard_concrete", "ranking")
SHAPES = ((65, 129, 200), (144, 272, 208))  # the second is aligned


def step(case: Case, how: tuple[Callable[..., Any], ...], mask: list[bool], device: str) -> None:
    """Run one forward and one backward."""
    case = case.to(device)
    y, r, c = how[0](case.call())
    dy = torch.randn(y.shape).to(y)
    how[1](case.call(), dy, y, r, c, mask)


def train(device: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    """Run the gated Linear: each way, mask and distribution, in order, and compact."""
    multiple = launch.ALIGN if n % launch.ALIGN == 0 else 1
    for mask in (FROZEN, PRETRAINING):
        for distribution in DISTRIBUTIONS:
            for how in (FUSED, FOLD):
                step(make(m, n, k, dtype, distribution), how, mask, device)
            step(in_order(make(m, n, k, dtype, distribution)), FUSED, mask, device)
        step(make(m, n, k, dtype, "ranking", closed_grad=True), FUSED, mask, device)
        for tokens in (5, m):
            closed = make(tokens, n, k, dtype, "ranking", closed_grad=True)
            step(in_order(closed), FUSED, mask, device)
            compact = in_order(make(tokens, n, k, dtype, "ranking"), multiple)
            step(compact, FUSED, mask, device)


def infer(device: str, dtype: torch.dtype) -> None:
    """Run pruned Linears of few and of many tokens, and each norm."""
    rows, columns = (
        torch.randperm(size)[:count].sort().values.int().to(device)
        for size, count in ((129, 101), (200, 151))
    )
    w, b = torch.randn(101, 151).to(device, dtype), torch.randn(101).to(device, dtype)
    for m in (1, 33, 70):  # 70 fill half of the largest tile
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
    """Run everything, with the tiles for a whole device and for one of a single multiprocessor.

    Shapes as small as these fill only the second with the largest tile of a row.
    """
    for count in {launch.processors(torch.device(device)), 1}:
        with mock.patch.object(launch, "processors", lambda _, count=count: count):
            for dtype in dtypes:
                for shape in SHAPES:
                    train(device, dtype, *shape)
                infer(device, dtype)
    penalise(device)


if __name__ == "__main__":
    run("cuda", (torch.float32, torch.float16, torch.bfloat16))
    torch.cuda.synchronize()
