"""The script that compute-sanitizer watches launches all that is compiled for GPUs."""

from __future__ import annotations

import torch

import every_kernel
from finegates.kernels.compile import VARIANTS
from finegates.kernels.launch import GEMM, largest_tile
from launches import Launches


def test_no_kernel_and_no_row_of_the_launch_table_is_left_out(launches: Launches) -> None:
    every_kernel.run("cpu", (torch.float16,))
    compiled = set()
    for variant in VARIANTS:
        kernel = variant.kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
        compiled.add((kernel, variant.row or variant.table["BLOCK"]))
    assert launches.tiles == compiled


def test_the_largest_and_the_smallest_tile_of_each_row_are_launched() -> None:
    """By a device of one multiprocessor, and by one that so small a shape never fills."""
    odd, aligned = every_kernel.SHAPES
    for (row, bits), families in GEMM.items():
        for family, tiles in families.items():
            sizes = odd if row.endswith("_odd") else aligned
            chosen = [largest_tile(row, bits, family, count, *sizes) for count in (1, 100)]
            assert chosen == [tiles[0], tiles[-1]], (row, bits, family)
