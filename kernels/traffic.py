"""What a gated layer moves and launches, as functions of its sizes: the model behind the bars.

`issued` bytes are what the programs ask for (mostly served by L2), `compulsory` bytes are the
distinct ones, which come from memory at least once. tests/interpreter/test_traffic.py counts both.
"""

from typing import NamedTuple

from .gate import CHUNK
from .launch import Tile, cdiv


class Traffic(NamedTuple):
    """Bytes by argument of one kernel: issued loads, issued stores, distinct bytes."""

    loads: dict[str, int]
    stores: dict[str, int]
    distinct: dict[str, int]

    @property
    def compulsory(self) -> int:
        """Distinct bytes read or written."""
        return sum(self.distinct.values())


def forward(m: int, n: int, k: int, size: int, tile: Tile) -> Traffic:
    """Return the traffic of the sampled forward with bias, both sides gated and open.

    ``size`` is the bytes of an element of x; gates and logits have 4, the seeds 8.
    """
    tiles_m, tiles_n = cdiv(m, tile.m), cdiv(n, tile.n)
    programs = tiles_m * tiles_n
    loads = {
        "x": tiles_n * m * k * size,
        "w": tiles_m * n * k * size,
        "b": tiles_m * n * size,
        "row_logits": tiles_m * n * 4,
        "column_logits": programs * k * 4,
        "seed": programs * (1 + cdiv(k, CHUNK.value)) * 8,
        "c": programs * k * 4,
    }
    stores = {"y": m * n * size, "r": n * 4, "c": programs * k * 4}
    distinct = {
        "x": m * k * size,
        "w": n * k * size,
        "b": n * size,
        "row_logits": n * 4,
        "column_logits": k * 4,
        "seed": 16,
        "y": m * n * size,
        "r": n * 4,
        "c": k * 4,
    }
    return Traffic(loads, stores, distinct)


def backward(m: int, n: int, k: int, size: int, tile: Tile) -> Traffic:
    """Return the traffic of the frozen weight's backward, first stage: dx and all sums."""
    tiles_m, tiles_k = cdiv(m, tile.m), cdiv(k, tile.k)
    programs = tiles_m * tiles_k
    loads = {
        "dy": (tiles_k + 1) * m * n * size,
        "w": tiles_m * n * k * size,
        "x": m * k * size,
        "y": m * n * size,
        "r": programs * 2 * n * 4,
        "c": tiles_m * k * 4,
    }
    stores = {
        "dx": m * k * size,
        "dc": tiles_m * k * 4,
        "dr": tiles_m * n * 4,
        "db": tiles_m * n * 4,
    }
    distinct = {
        **stores,
        "dy": m * n * size,
        "w": n * k * size,
        "x": m * k * size,
        "y": m * n * size,
        "r": n * 4,
        "c": k * 4,
    }
    return Traffic(loads, stores, distinct)


def ordered_weight(
    m: int, n: int, k: int, size: int, forward: Tile, backward: Tile, left: tuple[int, int]
) -> int:
    """Return the bytes of w that a step issues with ``left`` rows and columns open and first.

    Whole tiles: a step gets cheaper by each tile of closed gates.
    """
    issued = 0
    for tile in (forward, backward):
        rows = min(-(-left[0] // tile.n) * tile.n, n)
        columns = min(-(-left[1] // tile.k) * tile.k, k)
        issued += cdiv(m, tile.m) * rows * columns * size
    return issued


def gemm(m: int, n: int, k: int, size: int) -> int:
    """Return the compulsory bytes of a plain product."""
    return size * (m * k + n * k + m * n)


def frozen(m: int, n: int, k: int, size: int, bias: bool) -> int:
    """Return a frozen Linear's compulsory bytes: forward, backward to x and, if any, to the bias.

    Only the bias takes a second read of dy, for its gradient.
    """
    return 2 * gemm(m, n, k, size) + (size * (m * n + 2 * n) if bias else 0)


def naive_extra(m: int, n: int, k: int, size: int) -> int:
    """Return what gating by elementwise passes adds: 6 M (K + N) elements.

    x ⊙ c and its two gradients read or write x-sized tensors six times, r ⊙ y y-sized ones.
    """
    return 6 * m * (k + n) * size


# Kernel launches of one layer's training step with a frozen weight and a bias, both sides gated.
# "ordered" has closed gates last on both sides and more than `GATHER_ROWS` tokens.
LAUNCHES = {
    "fused": {
        "forward": ("seed", "gated_matmul_fwd"),
        "backward": ("gated_matmul_bwd_x", "gated_matmul_bwd_gates"),
    },
    "fold": {
        "forward": ("seed", "fold_fwd", "cublas"),
        "backward": ("fold_fwd", "cublas", "fold_bwd", "gated_matmul_bwd_gates"),
    },
    "ordered": {
        "forward": ("seed", "index_select", "norm_gather_fwd", "gated_matmul_fwd"),
        "backward": (
            "norm_gather_fwd",
            "gated_matmul_bwd_x",
            "gated_matmul_bwd_gates",
            "index_add",
        ),
    },
}
# Those of them that are torch's.
TORCH_LAUNCHES = ("seed", "cublas", "index_select", "index_add")
