"""Seconds that a gated layer should take: kernels/traffic.py over data sheets, nothing measured.

The choice between gates in the GEMM and folded ones, and the predictions of docs/kernels.md.
"""

import functools
from typing import NamedTuple

from . import traffic
from .launch import Tile, cdiv, largest_tile
from .traffic import LAUNCHES, compulsory


class Rates(NamedTuple):
    """Dense 16-bit matmul FLOP/s, bytes/s, multiprocessors, and instructions of one lane a second.

    The last is multiprocessors × 128 lanes (64 on CDNA) × the clock that the peak is given for.
    """

    peak: float
    bandwidth: float
    processors: int
    lanes: float


# A100 80GB, H100 SXM, B200, L40S, MI300X, from the vendors' data sheets.
RATES = {
    "ampere": Rates(312e12, 2.0e12, 108, 19.5e12),
    "hopper": Rates(989e12, 3.35e12, 132, 30.9e12),
    "blackwell": Rates(2250e12, 8.0e12, 148, 35.0e12),
    "consumer": Rates(362e12, 0.86e12, 142, 45.8e12),
    "cdna": Rates(1307e12, 5.3e12, 304, 40.9e12),
}
# What cuBLAS reaches of the peak on large shapes, and Triton of cuBLAS: between the two figures of
# triton#3672 that a kernel set on an H100, 0.82 at 2944³ and 0.90 at 3072³. That smaller
# products, from 256³ to 2816³, all take 80 to 90 µs a call, which is the host's time.
_CUBLAS = 0.7
_TRITON = 0.86
_LAUNCH = 3e-6
# Instructions that draw one Gaussian gate: 625 for four of them in sm_90's code.
_DRAW = 156
_FP32 = 16.0  # as much of the 16-bit rate as fp32 takes without tf32


class Layer(NamedTuple):
    """The costs of one layer's passes, each as (gates in the GEMM, gates folded into w).

    Without ``noise`` gates are a function of their logits, which costs nothing here.
    """

    m: int
    n: int
    k: int
    size: int
    family: str = "hopper"
    noise: bool = True

    def forward(self) -> tuple[float, float]:
        """Return seconds of the forward; folding reads and writes w once more.

        What every program draws is added as if it overlapped nothing.
        """
        inside = traffic.forward(*self._shape, self._tile("fwd"))
        fold = traffic.fold(*self._shape[1:])
        fused = self._gemm(compulsory(inside), _TRITON) + self._draw(inside)
        folded = self._stream(compulsory(fold)) + self._draw(fold)
        return fused, folded + self._gemm(traffic.gemm(*self._shape))

    def backward(self, trains_weight: bool) -> tuple[float, float]:
        """Return seconds of the backward to x, both gates and the bias, and to w where trained.

        Both add the first-stage sums in one launch more; the folded one reads x, dx, dy and y for
        them, the other x and y (or, with a trained weight, nothing but what its GEMM reads).
        """
        plain, tile = traffic.gemm(*self._shape), self._tile("bwd_x")
        again = self._stream(compulsory(traffic.fold_again(*self._shape[1:])))
        sums = self._stream(compulsory(traffic.folded_sums(*self._shape)))
        tiles = traffic.sum_tiles(self.m)
        folded = self._gemm(plain) + again + sums + self._second_stage(tiles, tiles)
        if not trains_weight:
            moved = compulsory(traffic.backward(*self._shape, tile))
            tiles = cdiv(self.m, tile.m)
            return self._gemm(moved, _TRITON) + self._second_stage(tiles, tiles), folded
        tile = self._tile("bwd_w")
        moved = compulsory(traffic.weight_gradient(*self._shape, tile))
        fused = self._gemm(plain, _TRITON) + self._gemm(moved, _TRITON)
        fused += self._second_stage(cdiv(self.k, tile.k), cdiv(self.n, tile.n))
        return fused, folded + self._gemm(plain) + again

    def compact(self, rows: int, columns: int) -> float:
        """Return seconds of a ranking step with a frozen weight on its living rows and columns.

        What is left is filled up and gathered before each product. Torch's launches move little:
        bias, logits' room, sums.
        """
        n, k = traffic.filled(rows, self.n), traffic.filled(columns, self.k)
        left = Layer(self.m, n, k, self.size, self.family)
        gathers = sum(self._stream(2 * self.m * side * self.size) for side in (n, k))
        tile = left._tile("fwd_map")
        forward = traffic.pruned(self.m, n, k, self.n, self.size, tile, gathered=True)
        tile = left._tile("bwd_x_map")
        backward = traffic.compact_backward(self.m, n, k, self.k, self.size, tile, gathered=True)
        products = sum(left._gemm(compulsory(t), _TRITON) for t in (forward, backward))
        tiles = cdiv(self.m, tile.m)
        torch = sum(name.startswith("aten.") for way in LAUNCHES["compact"] for name in way)
        return gathers + products + left._second_stage(tiles, tiles) + torch * _LAUNCH

    def pruned(self, rows: int, columns: int) -> float:
        """Return seconds of `pruned_linear` with so many kept rows and columns, for few tokens."""
        left = Layer(self.m, rows, columns, self.size, self.family)
        moved = traffic.pruned(*left._shape[:3], self.n, self.size, left._tile("fwd_map"), False)
        return left._gemm(compulsory(moved), _TRITON)

    def dense(self) -> float:
        """Return seconds of a Linear's forward."""
        return self._gemm(traffic.gemm(*self._shape))

    def frozen(self, bias: bool) -> float:
        """Return seconds of a frozen Linear's step: two GEMMs and the sum of dy."""
        plain = traffic.gemm(*self._shape)
        step = 2.0 * self._gemm(plain)
        more = traffic.frozen(*self._shape, bias) - 2 * plain
        return step + self._stream(more) if bias else step

    def step(self) -> float:
        """Return seconds of a frozen weight's gated step: the seed, and the better of each pass."""
        return _LAUNCH + min(self.forward()) + min(self.backward(False))

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return self.m, self.n, self.k, self.size

    @property
    def _rates(self) -> Rates:
        return RATES[self.family]

    def _second_stage(self, row_tiles: int, column_tiles: int) -> float:
        moved = traffic.second_stage(self.n, self.k, self.size, row_tiles, column_tiles)
        return self._stream(compulsory(moved))

    def _tile(self, kernel: str) -> Tile:
        bits = 8 * self.size
        return largest_tile(
            kernel, bits, self.family, self._rates.processors, self.m, self.n, self.k
        )

    def _draw(self, moved: traffic.Traffic) -> float:
        return traffic.draws(moved) * _DRAW / self._rates.lanes if self.noise else 0.0

    def _stream(self, moved: int) -> float:
        return moved / self._rates.bandwidth + _LAUNCH

    def _gemm(self, moved: int, efficiency: float = 1.0) -> float:
        """Return the longer of a GEMM's arithmetic and its traffic."""
        peak = self._rates.peak * _CUBLAS / (_FP32 if self.size == 4 else 1.0)
        arithmetic = 2.0 * self.m * self.n * self.k / (peak * efficiency)
        return max(arithmetic, moved / self._rates.bandwidth) + _LAUNCH


@functools.lru_cache(maxsize=1024)
def estimate(
    m: int,
    n: int,
    k: int,
    size: int,
    family: str,
    backward: bool,
    trains_weight: bool,
    noise: bool = True,
) -> tuple[float, float]:
    """Return seconds of one pass with the gates inside the GEMM, and folded into w."""
    layer = Layer(m, n, k, size, family, noise)
    return layer.backward(trains_weight) if backward else layer.forward()
