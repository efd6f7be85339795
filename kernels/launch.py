"""The launch table as data, and the choice of a row for a shape and a device."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Sizes are int32 in the kernels (offsets are int64); room is left for the last tile's padding.
MAX_SIZE = 2**31 - 2**10
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Tile(NamedTuple):
    """Block sizes of one launch: M × N × K of the Linear, whatever the kernel contracts over."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# (kernel, bits of the dtype) → per family of devices the tiles, largest first. resources.json holds
# what each of them compiles to; tests/test_kernels_compile.py keeps the two together.
FAMILIES = ("hopper", "blackwell", "ampere", "consumer", "cdna", "interpreter")
GEMM: dict[tuple[str, int], dict[str, tuple[Tile, ...]]] = {
    ("fwd", 16): {
        "hopper": (
            Tile(128, 256, 64, 8, 3),
            Tile(128, 128, 64, 4, 4),
            Tile(64, 64, 64, 4, 4),
            Tile(16, 32, 128, 4, 5),
        ),
        "blackwell": (Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4), Tile(16, 32, 64, 4, 4)),
        "ampere": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 32, 4, 4), Tile(16, 32, 128, 4, 5)),
        "consumer": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4), Tile(16, 32, 128, 4, 4)),
        "cdna": (Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2), Tile(16, 32, 128, 4, 2)),
        "interpreter": (Tile(32, 64, 64, 4, 1),),
    },
    ("bwd_x", 16): {
        "hopper": (Tile(128, 64, 128, 8, 4), Tile(64, 64, 64, 4, 4)),
        "blackwell": (Tile(128, 64, 128, 8, 4), Tile(64, 64, 64, 4, 4)),
        "ampere": (Tile(128, 64, 128, 8, 3), Tile(64, 64, 64, 4, 4)),
        "consumer": (Tile(128, 32, 128, 8, 4), Tile(64, 64, 64, 4, 3)),
        "cdna": (Tile(128, 64, 128, 4, 2), Tile(64, 64, 64, 4, 2)),
        "interpreter": (Tile(32, 64, 64, 4, 1),),
    },
    ("bwd_w", 16): {
        "hopper": (Tile(64, 128, 128, 8, 3), Tile(64, 64, 64, 4, 4)),
        "blackwell": (Tile(64, 128, 128, 8, 3), Tile(64, 64, 64, 4, 4)),
        "ampere": (Tile(64, 128, 128, 8, 3), Tile(64, 64, 64, 4, 4)),
        "consumer": (Tile(32, 128, 128, 8, 4), Tile(64, 64, 64, 4, 3)),
        "cdna": (Tile(64, 128, 128, 8, 2), Tile(64, 64, 64, 4, 2)),
        "interpreter": (Tile(64, 32, 64, 4, 1),),
    },
    # What is not `aligned`: an address and a load per element, in whatever strides.
    ("fwd_odd", 16): {
        **dict.fromkeys(FAMILIES, (Tile(64, 64, 32, 8, 3),)),
        "consumer": (Tile(64, 64, 32, 4, 3),),
        "cdna": (Tile(16, 32, 32, 4, 2),),
        "interpreter": (Tile(32, 64, 64, 4, 1),),
    },
    ("bwd_x_odd", 16): {
        **dict.fromkeys(FAMILIES, (Tile(64, 64, 64, 8, 3),)),
        "cdna": (Tile(16, 16, 32, 4, 2),),
        "interpreter": (Tile(32, 64, 64, 4, 1),),
    },
    ("bwd_w_odd", 16): {
        **dict.fromkeys(FAMILIES, (Tile(64, 64, 64, 8, 3),)),
        "consumer": (Tile(64, 64, 64, 4, 3),),
        "cdna": (Tile(32, 32, 32, 4, 2),),
        "interpreter": (Tile(64, 32, 64, 4, 1),),
    },
    # With index maps: an address per element of what is gathered or scattered, so smaller tiles;
    # an activation or a residual in the epilogue takes registers too.
    # The last tile is for a few tokens: 16 rows of w a program keep more of the device streaming.
    ("fwd_map", 16): {
        "hopper": (Tile(128, 64, 64, 8, 3), Tile(32, 64, 64, 4, 4), Tile(16, 16, 256, 4, 4)),
        "blackwell": (Tile(128, 64, 64, 8, 3), Tile(32, 32, 64, 4, 4), Tile(16, 16, 256, 4, 4)),
        "ampere": (Tile(128, 64, 64, 8, 3), Tile(32, 64, 64, 4, 4), Tile(16, 16, 128, 4, 5)),
        "consumer": (Tile(64, 64, 32, 8, 3), Tile(32, 64, 32, 4, 3), Tile(16, 16, 128, 4, 5)),
        "cdna": (Tile(128, 16, 128, 4, 2), Tile(16, 32, 128, 4, 1)),
        "interpreter": (Tile(32, 64, 64, 4, 1),),
    },
    ("bwd_x_map", 16): {
        "hopper": (Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
        "blackwell": (Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
        "ampere": (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3)),
        "consumer": (Tile(64, 64, 64, 4, 3),),
        "cdna": (Tile(64, 32, 64, 4, 2),),
        "interpreter": (Tile(32, 64, 64, 4, 1),),
    },
    # fp32 runs on the FMA units, bit-faithful to PyTorch's default: registers set the tile.
    ("fwd", 32): {
        **dict.fromkeys(FAMILIES, (Tile(32, 64, 32, 4, 3), Tile(16, 32, 64, 4, 3))),
        "consumer": (Tile(32, 64, 32, 4, 2), Tile(16, 32, 64, 4, 2)),
        "cdna": (Tile(32, 64, 32, 4, 2), Tile(16, 32, 64, 4, 2)),
        "interpreter": (Tile(32, 64, 64, 4, 1),),
    },
    ("bwd_x", 32): {
        **dict.fromkeys(FAMILIES, (Tile(32, 32, 64, 4, 3),)),
        "cdna": (Tile(32, 32, 64, 4, 2),),
        "interpreter": (Tile(32, 64, 64, 4, 1),),
    },
    ("bwd_x_map", 32): {
        **dict.fromkeys(FAMILIES, (Tile(32, 32, 64, 4, 3),)),
        "cdna": (Tile(32, 32, 64, 4, 2),),
        "interpreter": (Tile(32, 64, 64, 4, 1),),
    },
    ("bwd_w", 32): {
        **dict.fromkeys(FAMILIES, (Tile(32, 32, 64, 4, 3),)),
        "blackwell": (Tile(32, 32, 64, 4, 2),),
        "cdna": (Tile(32, 32, 64, 4, 2),),
        "interpreter": (Tile(64, 32, 64, 4, 1),),
    },
    ("fwd_odd", 32): {
        **dict.fromkeys(FAMILIES, (Tile(32, 64, 32, 4, 3),)),
        "cdna": (Tile(16, 32, 32, 4, 2),),
        "interpreter": (Tile(32, 64, 64, 4, 1),),
    },
    ("bwd_x_odd", 32): {
        **dict.fromkeys(FAMILIES, (Tile(32, 32, 64, 4, 3),)),
        "cdna": (Tile(16, 32, 32, 4, 2),),
        "interpreter": (Tile(32, 64, 64, 4, 1),),
    },
    ("bwd_w_odd", 32): {
        **dict.fromkeys(FAMILIES, (Tile(32, 32, 64, 4, 3),)),
        **dict.fromkeys(("hopper", "blackwell"), (Tile(32, 32, 32, 4, 3),)),
        "cdna": (Tile(32, 32, 32, 4, 2),),
        "interpreter": (Tile(64, 32, 64, 4, 1),),
    },
    ("fwd_map", 32): {
        **dict.fromkeys(FAMILIES, (Tile(32, 64, 32, 4, 3), Tile(16, 32, 64, 4, 3))),
        "ampere": (Tile(32, 64, 32, 4, 2), Tile(16, 32, 64, 4, 3)),
        "consumer": (Tile(32, 32, 32, 4, 3), Tile(16, 32, 64, 4, 3)),
        "cdna": (Tile(32, 32, 32, 4, 2), Tile(16, 32, 64, 4, 2)),
        "interpreter": (Tile(32, 64, 64, 4, 1),),
    },
}
# Elements: Triton specialises sizes and strides that are multiples of it, and loads 16 bytes there.
ALIGN = 16
# Up to this many tokens a GEMM gathers x in its own loads; beyond, one pass makes it dense first.
GATHER_ROWS = 64
# The share of the multiprocessors that a tile must occupy: the next smaller one keeps all of them
# busy, but draws the gates of a contraction in up to four times as many programs.
FILLED = 0.9
# Rows and columns that a program of the streaming kernels takes; of sums over rows so many steps,
# as every program leaves a row of fp32 sums behind.
STREAM = {"BLOCK_M": 32, "BLOCK": 256, "num_warps": 4}
SUMS = {**STREAM, "STEPS": 4, "num_warps": 8}
# What is not `aligned` takes an address for each element.
STREAM_ODD = {**STREAM, "BLOCK": 32, "num_warps": 8}
SUMS_ODD = {**SUMS, "BLOCK": 64, "num_warps": 4}
REDUCE = {"BLOCK": 64, "BLOCK_T": 32, "num_warps": 4}
# One row, or one gate vector, a program, in chunks.
ROW_WISE = {"BLOCK": 1024, "num_warps": 8}
# Multiply-add contraction, Triton's default until 3.10, where it asks to be told.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


@functools.cache
def family(device: torch.device) -> str:
    """Return the column of `GEMM` for a device."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "cdna"
    properties = torch.cuda.get_device_properties(device)
    if properties.shared_memory_per_block_optin < 160 * 1024:
        return "consumer"
    return {9: "hopper", 10: "blackwell"}.get(properties.major, "ampere")


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device, 1 in the interpreter."""
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def aligned(sizes: tuple[int, ...], *matrices: tuple[Tensor, Tensor | None]) -> bool:
    """Return whether matrices can come in 16-byte loads, which takes another row of `GEMM`.

    Args:
        sizes: the sizes along rows of matrices, and of what is stored.
        matrices: each with the index map of its columns, None if it has all; one that has a map may
            have rows of any length, as it is gathered or scattered.
    """
    return all(size % ALIGN == 0 for size in sizes) and all(
        t.stride(1) == 1
        and t.data_ptr() % 16 == 0
        and (index is not None or t.stride(0) % ALIGN == 0)
        for t, index in matrices
    )


def gemm_tile(kernel: str, x: Tensor, m: int, n: int, k: int) -> Tile:
    """Return `largest_tile` for x's dtype and device."""
    bits, device = x.dtype.itemsize * 8, x.device
    return largest_tile(kernel, bits, family(device), processors(device), m, n, k)


def largest_tile(
    kernel: str, bits: int, family: str, processors: int, m: int, n: int, k: int
) -> Tile:
    """Return the largest tile that wastes less than half its rows and fills a device (`FILLED`).

    Without one that fills it, the last and smallest: more programs, each with less to do.
    """
    row = GEMM[kernel, bits][family]
    for tile in row:
        if kernel.startswith("fwd"):
            rows, block_rows, columns, block_columns = m, tile.m, n, tile.n
        elif kernel.startswith("bwd_x"):
            rows, block_rows, columns, block_columns = m, tile.m, k, tile.k
        else:
            rows, block_rows, columns, block_columns = n, tile.n, k, tile.k
        if rows <= block_rows // 2:
            continue
        if cdiv(rows, block_rows) * cdiv(columns, block_columns) >= FILLED * processors:
            return tile
    return row[-1]


def gemm_options(tile: Tile) -> dict[str, Any]:
    """Return a tile as launch keywords; bands of 8 row tiles share operands in L2."""
    return {
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP_M": 8,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **OPTIONS,
    }


def cdiv(a: int, b: int) -> int:
    """Return ⌈a / b⌉, at least 1: an empty tensor still launches one masked program."""
    return max(round_up(a, b) // b, 1)


def round_up(a: int, b: int) -> int:
    """Return the least multiple of b that is not below a."""
    return -(-a // b) * b
