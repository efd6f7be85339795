"""What decoding adds: int8 weights, gated pairs, several layers of one input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Case, check, interleave, make_case, medians
from shapes import COLD_BYTES, DECODE_BATCHES, DECODE_LAYERS, DTYPES, REMOVED

from finegates.ops import _cpu
from finegates.report.ceilings import read_bandwidth
from numerics import assert_no_worse


def pack_int8(case: Case) -> torch.Tensor:
    q, scale = _cpu.quantize_rows(case.compact_weight)
    return _cpu.prepare(
        q,
        case.compact_bias,
        case.rows,
        case.columns,
        case.out_features,
        case.in_features,
        scale,
    )


def record(benchmark: Any, time: dict[str, float], over: str, **more: Any) -> None:
    benchmark.extra_info.update(
        {
            "microseconds": {name: 1e6 * t for name, t in time.items()},
            "ratio": time[over] / time["ours"],
            **more,
        }
    )


@pytest.mark.benchmark(group="int8")
@pytest.mark.parametrize("m", DECODE_BATCHES, ids=lambda m: f"M{m}")
@pytest.mark.parametrize("layer", DECODE_LAYERS)
def bench_int8(benchmark: Any, layer: str, m: int, threads: int) -> None:
    """Over our own bf16, neither in cache; and each against the dequantised formula first."""
    case = make_case(layer, "bf16", m, REMOVED)
    check(case)
    small = pack_int8(case)
    back = _cpu.unpack(small)
    assert back.scale is not None
    weight = back.weight.double() * back.scale.double()[:, None]
    exact = F.linear(case.compact_x.double(), weight, case.compact_bias.double())
    plain = F.linear(case.compact_x.float(), weight.float(), case.compact_bias.float())
    y = _cpu.pruned_linear(case.x, small, case.out_features)[:, case.rows.long()]
    assert_no_worse(y, plain.bfloat16(), exact)
    copies = COLD_BYTES // small.numel() + 1
    turns = {"ours": [small.clone() for _ in range(copies)]}
    turns["bf16"] = [case.packed.clone() for _ in range(copies // 2 + 1)]
    at = {"ours": 0, "bf16": 0}

    def call(name: str) -> torch.Tensor:
        at[name] = (at[name] + 1) % len(turns[name])
        return _cpu.pruned_linear(case.x, turns[name][at[name]], case.out_features)

    time = medians(interleave({name: lambda n=name: call(n) for name in turns}, 1.0))
    rate = case.compact_weight.numel() / time["ours"]
    share = rate / read_bandwidth(256, threads)
    benchmark.extra_info.update({"layer": layer, "m": m, "threads": threads})
    record(benchmark, time, "bf16", gbytes_per_second=rate / 1e9, share_of_read_bandwidth=share)
    benchmark.pedantic(call, args=("ours",), rounds=5, iterations=1)


@pytest.mark.benchmark(group="pair")
@pytest.mark.parametrize("m", DECODE_BATCHES, ids=lambda m: f"M{m}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", DECODE_LAYERS)
def bench_gated_pair(benchmark: Any, layer: str, dtype: str, m: int, threads: int) -> None:
    """One call for act(gate) * up, over two of our calls and two torch operations."""
    case = make_case(layer, dtype, m, REMOVED)
    check(case)
    n = case.out_features
    up_weight, compact_up = case.weight.flip(1), case.compact_weight.flip(1)
    up = _cpu.prepare(compact_up, case.compact_bias, case.rows, case.columns, n, case.in_features)
    gate = case.packed
    # Own copies for each: the second candidate must not find what the first one just read.
    gate_apart, up_apart = gate.clone(), up.clone()

    def apart() -> torch.Tensor:
        y = _cpu.pruned_linear(case.x, gate_apart, n, "silu")
        return y * _cpu.pruned_linear(case.x, up_apart, n)

    def ours() -> torch.Tensor:
        return _cpu.pruned_glu(case.x, gate, up, n)

    def dense() -> torch.Tensor:
        y = F.linear(case.x, case.weight, case.bias)
        return F.silu(y) * F.linear(case.x, up_weight, case.bias)

    operands = (case.compact_x, case.compact_weight, compact_up, case.compact_bias)
    plain, exact = _glu(*operands), _glu(*(t.double() for t in operands))
    assert_no_worse(ours()[:, case.rows.long()], plain, exact)
    time = medians(interleave({"ours": ours, "apart": apart, "dense": dense}, 0.5))
    benchmark.extra_info.update({"layer": layer, "dtype": dtype, "m": m, "threads": threads})
    record(benchmark, time, "apart", dense_ratio=time["dense"] / time["ours"])
    benchmark.pedantic(ours, rounds=5, iterations=1)


def _glu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.silu(F.linear(x, gate, b)) * F.linear(x, up, b)


@pytest.mark.benchmark(group="together")
@pytest.mark.parametrize("m", DECODE_BATCHES, ids=lambda m: f"M{m}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", DECODE_LAYERS)
def bench_three_layers(benchmark: Any, layer: str, dtype: str, m: int, threads: int) -> None:
    """Query, key and value in one call, over three calls."""
    case = make_case(layer, dtype, m, REMOVED)
    check(case)
    n = case.out_features
    packed, packed_apart = ([case.packed.clone() for _ in range(3)] for _ in range(2))

    def ours() -> list[torch.Tensor]:
        return _cpu.pruned_linears(case.x, packed, [n, n, n])

    def apart() -> list[torch.Tensor]:
        return [_cpu.pruned_linear(case.x, p, n) for p in packed_apart]

    assert all(torch.equal(a, b) for a, b in zip(ours(), apart(), strict=True))
    time = medians(interleave({"ours": ours, "apart": apart}, 0.5))
    benchmark.extra_info.update({"layer": layer, "dtype": dtype, "m": m, "threads": threads})
    record(benchmark, time, "apart")
    benchmark.pedantic(ours, rounds=5, iterations=1)
