"""What a gated layer moves and launches, as functions of its sizes: the model behind the bars.

A model says per argument of a kernel which bytes its programs ask for (mostly served by L2) and
which of them are distinct and come from memory at least once. tests/interpreter/test_traffic.py
counts every kernel against its model, and every way's launches against `LAUNCHES`.

``size`` is the bytes of an element of x; gates, logits, first-stage sums and index maps have 4.
"""

from typing import NamedTuple

from .gate import CHUNK
from .launch import ALIGN, STREAM, SUMS, Tile, cdiv, round_up


class Flow(NamedTuple):
    """Bytes of one argument: distinct ones, issued by loads, issued by stores."""

    distinct: int
    loads: int = 0
    stores: int = 0


Traffic = dict[str, Flow]


def compulsory(traffic: Traffic) -> int:
    """Return the distinct bytes that a kernel reads or writes."""
    return sum(flow.distinct for flow in traffic.values())


def draws(traffic: Traffic) -> int:
    """Return how many gates a kernel's programs draw: each loads its logit."""
    return sum(flow.loads for name, flow in traffic.items() if name.endswith("logits")) // 4


def _flow(width: int, elements: int, loads: int = 0, stores: int = 0) -> Flow:
    """Return the bytes of ``elements``, each loaded and stored so many times."""
    distinct = width * elements
    return Flow(distinct, loads * distinct, stores * distinct)


def forward(m: int, n: int, k: int, size: int, tile: Tile) -> Traffic:
    """Return the sampled forward's, with bias, both sides gated and open."""
    tiles_m, tiles_n = cdiv(m, tile.m), cdiv(n, tile.n)
    programs = tiles_m * tiles_n
    return {
        "x": _flow(size, m * k, loads=tiles_n),
        "w": _flow(size, n * k, loads=tiles_m),
        "b": _flow(size, n, loads=tiles_m),
        "row_logits": _flow(4, n, loads=tiles_m),
        "column_logits": _flow(4, k, loads=programs),
        "seed": Flow(16, loads=programs * (1 + cdiv(k, CHUNK.value)) * 8),
        "y": _flow(size, m * n, stores=1),
        "r": _flow(4, n, stores=1),
        "c": _flow(4, k, loads=programs, stores=programs),
    }


def pruned(
    m: int,
    n: int,
    k: int,
    n_out: int,
    size: int,
    tile: Tile,
    gathered: bool,
    residual: bool = False,
) -> Traffic:
    """Return the forward's on a compact w [n, k] that scatters to ``n_out`` features.

    ``gathered`` says that x has its kept columns only. The gaps between kept rows are written by
    intervals that hold the kept ones too, which are then written again.
    """
    tiles_m, tiles_n = cdiv(m, tile.m), cdiv(n, tile.n)
    gaps = 0 if n == n_out else 2 * (tiles_n - 1)
    written = m * (n + (0 if n == n_out else n_out))
    traffic = {
        "x": _flow(size, m * k, loads=tiles_n),
        "w": _flow(size, n * k, loads=tiles_m),
        "b": _flow(size, n, loads=tiles_m),
        "rows": Flow(4 * n, loads=4 * tiles_m * (n + gaps)),
        "y": Flow(size * m * n_out, stores=size * written),
    }
    if not gathered:
        traffic["columns"] = _flow(4, k, loads=tiles_m * tiles_n)
    if residual:
        traffic["residual"] = Flow(size * m * n_out, loads=size * written)
    return traffic


def backward(m: int, n: int, k: int, size: int, tile: Tile) -> Traffic:
    """Return the frozen weight's backward's first stage: dx and all sums, all gates open."""
    tiles_m, tiles_k = cdiv(m, tile.m), cdiv(k, tile.k)
    return {
        "dy": _flow(size, m * n, loads=tiles_k + 1),
        "w": _flow(size, n * k, loads=tiles_m),
        "x": _flow(size, m * k, loads=1),
        "y": _flow(size, m * n, loads=1),
        "r": _flow(4, n, loads=2 * tiles_m * tiles_k),
        "c": _flow(4, k, loads=tiles_m),
        "dx": _flow(size, m * k, stores=1),
        **_sums(tiles_m, n, k),
    }


def compact_backward(
    m: int, n: int, k: int, k_in: int, size: int, tile: Tile, gathered: bool
) -> Traffic:
    """Return `backward`'s on a compact w [n, k], which scatters dx to ``k_in`` features.

    ``gathered`` says that dy has its kept rows only.
    """
    tiles_m, tiles_k = cdiv(m, tile.m), cdiv(k, tile.k)
    gaps = 0 if k == k_in else 2 * (tiles_k - 1)
    written = m * (k + (0 if k == k_in else k_in))
    return {
        "dy": _flow(size, m * n, loads=tiles_k + 1),
        "w": _flow(size, n * k, loads=tiles_m),
        "x": _flow(size, m * k, loads=1),
        "y": _flow(size, m * n, loads=1),
        "rows": _flow(4, n, loads=tiles_m * (1 if gathered else tiles_k + 1)),
        "columns": Flow(4 * k, loads=4 * tiles_m * (k + gaps)),
        "dx": Flow(size * m * k_in, stores=size * written),
        **_sums(tiles_m, n, k),
    }


def closed_rows(m: int, n: int, k: int, size: int, tile: Tile) -> Traffic:
    """Return the traffic of dr where all n rows are closed; a tile without one loads r only."""
    tiles_m, tiles_n = cdiv(m, tile.m), cdiv(n, tile.n)
    return {
        "x": _flow(size, m * k, loads=tiles_n),
        "w": _flow(size, n * k, loads=tiles_m),
        "b": _flow(size, n, loads=tiles_m),
        "dy": _flow(size, m * n, loads=1),
        "r": _flow(4, n, loads=tiles_m),
        "c": _flow(4, k, loads=2 * tiles_m * tiles_n),
        "dr": _flow(4, tiles_m * n, stores=1),
    }


def weight_gradient(m: int, n: int, k: int, size: int, tile: Tile) -> Traffic:
    """Return the trained weight's backward's first stage: dw and all sums."""
    tiles_n, tiles_k = cdiv(n, tile.n), cdiv(k, tile.k)
    return {
        "dy": _flow(size, m * n, loads=tiles_k + 1),
        "x": _flow(size, m * k, loads=tiles_n),
        "w": _flow(size, n * k, loads=1),
        "b": _flow(size, n, loads=tiles_k),
        "r": _flow(4, n, loads=tiles_k),
        "c": _flow(4, k, loads=tiles_n),
        "dw": _flow(size, n * k, stores=1),
        "dc": _flow(4, tiles_n * k, stores=1),
        "dr": _flow(4, tiles_k * n, stores=1),
        "db": _flow(4, tiles_k * n, stores=1),
    }


def second_stage(n: int, k: int, size: int, row_tiles: int, column_tiles: int) -> Traffic:
    """Return the traffic of adding the first stage's sums, and applying dz/dθ; bias included."""
    return {
        "dr": _flow(4, row_tiles * n, loads=1),
        "dc": _flow(4, column_tiles * k, loads=1),
        "db": _flow(4, row_tiles * n, loads=1),
        "r": _flow(4, n, loads=2),
        "c": _flow(4, k, loads=1),
        "row_logits": _flow(4, n, loads=1),
        "column_logits": _flow(4, k, loads=1),
        "drow_logits": _flow(4, n, stores=1),
        "dcolumn_logits": _flow(4, k, stores=1),
        "dbias": _flow(size, n, stores=1),
    }


def fold(n: int, k: int, size: int, block: int = STREAM["BLOCK"]) -> Traffic:
    """Return the traffic of w' = (r cᵀ) ⊙ w and b' = r ⊙ b, sampled, all gates open.

    A program takes ``block`` columns of w.
    """
    tiles_n, tiles_k = cdiv(n, STREAM["BLOCK_M"]), cdiv(k, block)
    return {
        "w": _flow(size, n * k, loads=1),
        "b": _flow(size, n, loads=1),
        "row_logits": _flow(4, n, loads=tiles_k),
        "column_logits": _flow(4, k, loads=tiles_n),
        "seed": _flow(8, 2, loads=tiles_n * tiles_k),
        "folded": _flow(size, n * k, stores=1),
        "folded_bias": _flow(size, n, stores=1),
        "r": _flow(4, n, stores=1),
        "c": _flow(4, k, stores=1),
    }


def fold_again(n: int, k: int, size: int, block: int = STREAM["BLOCK"]) -> Traffic:
    """Return the traffic of w' in backward, from the values that the forward drew."""
    tiles_n, tiles_k = cdiv(n, STREAM["BLOCK_M"]), cdiv(k, block)
    return {
        "w": _flow(size, n * k, loads=1),
        "r": _flow(4, n, loads=tiles_k),
        "c": _flow(4, k, loads=tiles_n),
        "folded": _flow(size, n * k, stores=1),
    }


def folded_sums(m: int, n: int, k: int, size: int) -> Traffic:
    """Return the folded backward's first stage: Σ dy ⊙ y, Σ x ⊙ dx and Σ dy."""
    return {
        "dy": _flow(size, m * n, loads=1),
        "y": _flow(size, m * n, loads=1),
        "x": _flow(size, m * k, loads=1),
        "dx": _flow(size, m * k, loads=1),
        **_sums(sum_tiles(m), n, k),
    }


def sum_tiles(m: int) -> int:
    """Return how many rows of sums `folded_sums` leaves to the second stage."""
    return cdiv(m, SUMS["BLOCK_M"] * SUMS["STEPS"])


def _sums(tiles: int, n: int, k: int) -> Traffic:
    """Return the stores of a first stage over m: a row of sums for each tile."""
    return {
        "dc": _flow(4, tiles * k, stores=1),
        "dr": _flow(4, tiles * n, stores=1),
        "db": _flow(4, tiles * n, stores=1),
    }


# Times that a norm's statistics read the whole row before the kept columns are gathered.
_PASSES = {"none": 0, "rms": 1, "layer": 2}


def norm_gather(m: int, k: int, kept: int, size: int, norm: str) -> Traffic:
    """Return the traffic of a norm of x [m, k], weight and bias included, that stores ``kept``."""
    passes = _PASSES[norm]
    return {
        "x": Flow(size * m * (k if passes else kept), loads=size * m * (passes * k + kept)),
        "columns": _flow(4, kept, loads=m),
        "weight": _flow(size, kept, loads=m),
        "bias": _flow(size, kept, loads=m),
        "y": _flow(size, m * kept, stores=1),
    }


def open_mass(units: int, vectors: int) -> Traffic:
    """Return the penalty's forward: all logits of a model once, a sum for each gate vector."""
    return {
        "logits": _flow(4, units, loads=1),
        "offsets": Flow(8 * (vectors + 1), loads=16 * vectors),
        "out": _flow(4, vectors, stores=1),
    }


def open_mass_backward(units: int, vectors: int) -> Traffic:
    """Return the penalty's backward: all logits and their gradients once."""
    return {
        "dout": _flow(4, vectors, loads=1),
        "logits": _flow(4, units, loads=1),
        "offsets": Flow(8 * (vectors + 1), loads=16 * vectors),
        "dlogits": _flow(4, units, stores=1),
    }


def ordered_weight(
    m: int, n: int, k: int, size: int, forward: Tile, backward: Tile, left: tuple[int, int]
) -> int:
    """Return the bytes of w that a step issues with ``left`` rows and columns open and first.

    Whole tiles: a step gets cheaper by each tile of closed gates.
    """
    issued = 0
    for tile in (forward, backward):
        rows = min(round_up(left[0], tile.n), n)
        columns = min(round_up(left[1], tile.k), k)
        issued += cdiv(m, tile.m) * rows * columns * size
    return issued


def filled(living: int, size: int) -> int:
    """Return how many of a side's features a compact step computes with, see `surgery.shrink`."""
    count = round_up(living, ALIGN)
    return count if count <= size else living


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


# What a layer's training step launches, forward and backward, with a bias and both sides gated;
# torch's kernels by their aten name. "ordered" and "compact" have index maps on both sides, a side
# that is filled up, and more than `GATHER_ROWS` tokens. Compact weights that are trained are
# gathered in every step, frozen ones when the ranking moves.
_GATHERED = ("aten.index_select", "aten.mul")
_SPREAD = ("aten.mul", "aten.new_zeros", "aten.index_add")
LAUNCHES = {
    "fused": (
        ("aten.randint", "gated_matmul_fwd"),
        ("gated_matmul_bwd_x", "gated_matmul_bwd_gates"),
    ),
    "fused, weight trained": (
        ("aten.randint", "gated_matmul_fwd"),
        ("gated_matmul_bwd_x", "gated_matmul_bwd_w", "gated_matmul_bwd_gates"),
    ),
    "folded": (
        ("aten.randint", "fold_fwd", "aten.linear"),
        ("fold_fwd", "aten.matmul", "fold_bwd", "gated_matmul_bwd_gates"),
    ),
    "folded, weight trained": (
        ("aten.randint", "fold_fwd", "aten.linear"),
        (
            "fold_fwd",
            "aten.matmul",
            "aten.matmul",
            "fold_fwd",
            "fold_bwd",
            "gated_matmul_bwd_gates",
        ),
    ),
    "gradient of closed gates": (
        ("gated_matmul_fwd",),
        ("gated_matmul_bwd_x", "gated_matmul_bwd_r", "gated_matmul_bwd_gates"),
    ),
    "ordered": (
        ("aten.randint", "aten.index_select", "norm_gather_fwd", "gated_matmul_fwd"),
        (
            *("norm_gather_fwd", "aten.zeros", "aten.zeros"),
            *("gated_matmul_bwd_x", "gated_matmul_bwd_gates"),
            *_SPREAD[1:],
        ),
    ),
    "compact": (
        (*_GATHERED, "norm_gather_fwd", "gated_matmul_fwd"),
        (
            *("norm_gather_fwd", "aten.zeros", "aten.zeros"),
            *("gated_matmul_bwd_x", "gated_matmul_bwd_gates"),
            *_SPREAD,
        ),
    ),
    "compact, weight trained": (
        (*_GATHERED * 3, "norm_gather_fwd", "gated_matmul_fwd"),
        (
            *("norm_gather_fwd", "gated_matmul_bwd_x", "norm_gather_fwd", "norm_gather_fwd"),
            *("aten.zeros", "aten.zeros", "gated_matmul_bwd_w", "gated_matmul_bwd_gates"),
            *_SPREAD * 3,
        ),
    ),
}
