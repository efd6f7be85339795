"""What a call costs besides arithmetic, and what packing costs once."""

from __future__ import annotations

from typing import Any

import pytest
from harness import check, interleave, make_case, medians
from shapes import DTYPES, LAYERS, REMOVED, TINY

from finegates.ops import _cpu


@pytest.mark.benchmark(group="overhead")
@pytest.mark.parametrize("dtype", DTYPES)
def bench_call(benchmark: Any, dtype: str, threads: int) -> None:
    case = make_case(TINY, dtype, 1, REMOVED)
    check(case)
    pick = {name: case.candidates[name] for name in ("ours", "dense")}
    time = medians(interleave(pick, 2.0, rounds=400))
    benchmark.extra_info.update(
        {
            "layer": "64x64",
            "dtype": dtype,
            "m": 1,
            "threads": threads,
            "microseconds": {name: 1e6 * t for name, t in time.items()},
            "overhead_ratio": time["ours"] / time["dense"],
        }
    )
    benchmark.pedantic(case.candidates["ours"], rounds=50, iterations=20)


@pytest.mark.benchmark(group="pack")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def bench_pack(benchmark: Any, layer: str, dtype: str) -> None:
    """Packing once, in calls of the packed layer and of dense F.linear at M = 1."""
    case = make_case(layer, dtype, 1, REMOVED)

    def pack() -> object:
        return _cpu.prepare(
            case.compact_weight,
            case.compact_bias,
            case.rows,
            case.columns,
            case.out_features,
            case.in_features,
        )

    dense = case.candidates["dense"]
    time = medians(interleave({"pack": pack, "dense": dense}, 0.5))
    benchmark.extra_info.update(
        {
            "layer": layer,
            "dtype": dtype,
            "microseconds": {name: 1e6 * t for name, t in time.items()},
            "gbytes_per_second": case.weight_bytes / time["pack"] / 1e9,
            "memory_over_weight": case.packed.numel() / case.weight_bytes,
        }
    )
    benchmark.pedantic(pack, rounds=3, iterations=1)
