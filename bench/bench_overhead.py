"""What a call costs besides arithmetic, and what packing costs once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import check, interleave, make_case, medians
from shapes import DTYPES, LAYERS, REMOVED, TINY
from torch import Tensor, nn

from finegates.nn import PrunedLinear
from finegates.ops import _cpu, packed_linear
from finegates.ops.schema import ops


@pytest.mark.benchmark(group="overhead")
@pytest.mark.parametrize("dtype", DTYPES)
def bench_call(benchmark: Any, dtype: str, threads: int) -> None:
    """The kernel's caller, the public function, the module and the op behind it."""
    case = make_case(TINY, dtype, 1, REMOVED)
    check(case)
    with torch.inference_mode(False):  # a module's weights are ordinary tensors
        linear = nn.Linear(case.in_features, case.out_features, dtype=case.weight.dtype)
        linear.load_state_dict({"weight": case.weight, "bias": case.bias})
        pruned = PrunedLinear.from_linear(linear, case.rows.clone(), case.columns.clone())
    operands = (pruned.weight, pruned.bias, pruned.rows, pruned.columns, case.out_features)
    pick: dict[str, Callable[[], Tensor]] = {
        **{name: case.candidates[name] for name in ("ours", "dense")},
        "packed_linear": lambda: packed_linear(case.x, case.packed, case.out_features),
        "module": lambda: pruned(case.x),
        "op": lambda: ops.pruned_linear.default(case.x, *operands, "none", None, "auto"),
        "nn.Linear": lambda: linear(case.x),
    }
    for name in ("packed_linear", "module", "op"):
        assert torch.equal(pick[name](), pick["ours"]())
    time = medians(interleave(pick, 3.0, rounds=400))
    benchmark.extra_info.update(
        {
            "layer": "64x64",
            "dtype": dtype,
            "m": 1,
            "threads": threads,
            "microseconds": {name: 1e6 * t for name, t in time.items()},
            "overhead_ratio": time["ours"] / time["dense"],
            "packed_linear_ratio": time["packed_linear"] / time["dense"],
            "module_ratio": time["module"] / time["nn.Linear"],
            "op_ratio": time["op"] / time["dense"],
        }
    )
    benchmark.pedantic(case.candidates["ours"], rounds=50, iterations=20)


@pytest.mark.benchmark(group="pack")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def bench_pack(benchmark: Any, layer: str, dtype: str) -> None:
    """Packing once, in calls of the packed layer at M = 1."""
    case = make_case(layer, dtype, 1, REMOVED)
    assert torch.equal(_cpu.unpack(case.packed).weight, case.compact_weight)

    def pack() -> object:
        return _cpu.prepare(
            case.compact_weight,
            case.compact_bias,
            case.rows,
            case.columns,
            case.out_features,
            case.in_features,
        )

    time = medians(interleave({"pack": pack, "ours": case.candidates["ours"]}, 0.5))
    benchmark.extra_info.update(
        {
            "layer": layer,
            "dtype": dtype,
            "microseconds": {name: 1e6 * t for name, t in time.items()},
            "calls": time["pack"] / time["ours"],
            "gbytes_per_second": case.weight_bytes / time["pack"] / 1e9,
            "memory_over_weight": case.packed.numel() / case.weight_bytes,
        }
    )
    benchmark.pedantic(pack, rounds=3, iterations=1)
