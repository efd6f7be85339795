"""Loads, stores and launches counted in the interpreter, against kernels/traffic.py."""

from __future__ import annotations

import inspect
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from finegates import FusedGatedLinear, GateConfig
from finegates.kernels import fold, gated_matmul_bwd, launch, norm_gather, traffic
from finegates.kernels.gated_matmul import _gated_matmul_fwd_kernel
from finegates.kernels.gated_matmul_bwd import gated_matmul_bwd_x
from finegates.kernels.operands import Gates, Weight
from finegates.ops import _triton_gated
from gated_case import FROZEN, PRETRAINING, make

SHAPES = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "shapes.py"))


class Recorder:
    """Bytes that the interpreter's programs load and store, by the tensor they belong to."""

    def __init__(self) -> None:
        self.accesses: list[tuple[str, np.ndarray, int]] = []
        self.launched: list[str] = []

    def note(self, kind: str, ptrs: Any, mask: Any) -> None:
        width = np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty())).itemsize
        addresses = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data.astype(bool)]
        self.accesses.append((kind, addresses.ravel(), width))

    def touched_by_loads(self, tensor: Tensor) -> Tensor:
        """Return which elements of a contiguous tensor were loaded."""
        start, mask = tensor.data_ptr(), torch.zeros(tensor.numel(), dtype=torch.bool)
        for kind, addresses, _ in self.accesses:
            place = (addresses.astype(np.int64) - start) // tensor.element_size()
            place = place[(place >= 0) & (place < tensor.numel())]
            if kind == "load":
                mask[torch.from_numpy(place)] = True
        return mask.view(tensor.shape)

    def loads_of(self, tensor: Tensor) -> int:
        """Return the bytes issued in loads of one tensor."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.untyped_storage().nbytes()
        return sum(
            width * int(((addresses >= start) & (addresses < end)).sum())
            for kind, addresses, width in self.accesses
            if kind == "load"
        )

    def by_tensor(self, tensors: dict[str, Tensor]) -> tuple[Counter[str], ...]:
        """Return issued loads, issued stores and distinct bytes; an address outside all fails."""
        totals = {"load": Counter[str](), "store": Counter[str]()}
        touched: dict[str, list[np.ndarray]] = {name: [] for name in tensors}
        for kind, addresses, width in self.accesses:
            placed = 0
            for name, tensor in tensors.items():
                start = tensor.data_ptr()
                end = start + tensor.untyped_storage().nbytes()
                inside = addresses[(addresses >= start) & (addresses < end)]
                placed += len(inside)
                if len(inside):
                    totals[kind][name] += len(inside) * width
                    touched[name].append(np.stack((inside, np.full_like(inside, width))))
            assert placed == len(addresses), f"{kind} outside every tensor"
        distinct = Counter[str]()
        for name, parts in touched.items():
            if parts:
                addresses, widths = np.concatenate(parts, 1)
                _, first = np.unique(addresses, return_index=True)
                distinct[name] = int(widths[first].sum())
        return totals["load"], totals["store"], distinct


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    record = Recorder()
    builder = type(interpreter.interpreter_builder)
    load, store = builder.create_masked_load, builder.create_masked_store
    run = interpreter.GridExecutor.__call__

    def recorded_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        record.note("load", ptrs, mask)
        return load(self, ptrs, mask, *rest, **kwargs)

    def recorded_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record.note("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = self.fn.__name__
        record.launched.append(name.removeprefix("_").removesuffix("_kernel"))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(builder, "create_masked_load", recorded_load)
    monkeypatch.setattr(builder, "create_masked_store", recorded_store)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return record


def open_case(m: int, n: int, k: int, dtype: torch.dtype) -> Any:
    case = make(m, n, k, dtype)
    case.row_logits.fill_(0.4)
    case.column_logits.fill_(0.4)
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(64, 128, 192), (33, 70, 600), (1, 65, 64)], ids=str)
def test_forward(shape: Any, dtype: torch.dtype, recorder: Recorder) -> None:
    case = open_case(*shape, dtype)
    m, n, k = shape
    y, r, c = _triton_gated.gated_matmul_fused(case.call())
    tile = launch.gemm_tile("fwd", case.x, m, n, k)
    model = traffic.forward(m, n, k, dtype.itemsize, tile)
    named = {"x": case.x, "w": case.w, "b": case.b, "row_logits": case.row_logits}
    named |= {"column_logits": case.column_logits, "seed": case.seed, "y": y, "r": r, "c": c}
    assert recorder.by_tensor(named) == model
    assert recorder.launched == ["gated_matmul_fwd"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(64, 128, 192), (33, 70, 65)], ids=str)
def test_backward(shape: Any, dtype: torch.dtype, recorder: Recorder) -> None:
    case = open_case(*shape, dtype)
    m, n, k = shape
    dy, y = torch.randn(m, n).to(dtype), torch.randn(m, n).to(dtype)
    r, c = torch.full((n,), 0.5), torch.full((k,), 0.5)
    dx, dc, dr, db = gated_matmul_bwd_x(dy, case.x, y, Weight(case.w), Gates(r=r, c=c), (True,) * 4)
    model = traffic.backward(m, n, k, dtype.itemsize, launch.gemm_tile("bwd_x", case.x, m, n, k))
    named = {"dy": dy, "w": case.w, "x": case.x, "y": y, "r": r, "c": c}
    named |= {"dx": dx, "dc": dc, "dr": dr, "db": db}
    assert recorder.by_tensor(named) == model


def test_closed_tiles_are_not_read(recorder: Recorder) -> None:
    """Of 3 tiles of columns 2 are closed, of 2 tiles of rows 1: a sixth of x and of w is read."""
    m, n, k = 64, 128, 192
    case = open_case(m, n, k, torch.float32)
    case.row_logits[64:], case.column_logits[64:] = -9.0, -9.0
    y, r, c = _triton_gated.gated_matmul_fused(case.call())
    loads, _, _ = recorder.by_tensor(named := {**tensors_of(case), "y": y, "r": r, "c": c})
    assert loads["x"] == 4 * m * 64
    assert loads["w"] == (m // 32) * 4 * 64 * 64
    recorder.accesses.clear()
    dy = torch.randn(m, n)
    dx, dc, dr, db = gated_matmul_bwd_x(dy, case.x, y, Weight(case.w), Gates(r=r, c=c), (True,) * 4)
    loads, _, _ = recorder.by_tensor({**named, "dy": dy, "dx": dx, "dc": dc, "dr": dr, "db": db})
    assert loads["w"] == (m // 32) * 4 * 64 * 64
    assert loads["x"] == 4 * m * 64


@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete", "ranking"])
def test_a_step_reads_less_as_gates_close(distribution: str, recorder: Recorder) -> None:
    """Scattered closed gates cost what open ones do; put last, their tiles are not read."""
    m, n, k = 40, 320, 256
    config = GateConfig(distribution=distribution, closed_gradient=False)
    layer = FusedGatedLinear(k, n, config=config)
    layer.weight.requires_grad_(False)
    x = torch.randn(m, k, requires_grad=True)
    tiles = [launch.gemm_tile(kind, x, m, n, k) for kind in ("fwd_map", "bwd_x_map")]
    reads = []
    for closed in (0.0, 0.3, 0.6, 0.9, 1.0):
        left = []
        for gate in (layer.row_gate, layer.column_gate):
            assert gate is not None
            off = torch.randperm(gate.size)[: int(closed * gate.size)]
            with torch.no_grad():
                gate.logits.fill_(9.0)
                gate.logits[off] = -30.0  # no sample opens it
            left.append(gate.size - len(off))
        layer.reorder_()
        weight = layer._operands()[0]
        recorder.accesses.clear()
        layer(x).sum().backward()
        reads.append(recorder.loads_of(weight))
        assert reads[-1] == traffic.ordered_weight(m, n, k, 4, *tiles, tuple(left))
    assert reads[0] > reads[1] > reads[2] > reads[3] > reads[4] == 0


@pytest.mark.parametrize("gathered", [False, True])
def test_a_step_on_the_compact_weight_reads_what_is_left(
    gathered: bool, recorder: Recorder
) -> None:
    """Of the removed features neither x, dy, y nor w is read, in forward or backward."""
    m, n, k = 80 if gathered else 40, 192, 128
    case = make(m, n, k, distribution="ranking")
    rows, columns = (logits > 0 for logits in (case.row_logits, case.column_logits))
    case.w = case.w[rows][:, columns].clone()
    case.b = case.b[rows].clone()
    case.rows, case.columns = (side.nonzero().squeeze(1).int() for side in (rows, columns))
    y, r, c = _triton_gated.gated_matmul_fused(case.call())
    dy = torch.randn(m, n)
    for mask in (FROZEN, PRETRAINING):
        _triton_gated.gated_matmul_backward_fused(case.call(), dy, y, r, c, mask)
    for tensor, kept in ((case.x, columns), (dy, rows), (y, rows)):
        touched = recorder.touched_by_loads(tensor)
        assert touched.any()
        assert not touched[:, ~kept].any()


def tensors_of(case: Any) -> dict[str, Tensor]:
    names = ("x", "w", "b", "row_logits", "column_logits", "seed")
    return {name: getattr(case, name) for name in names}


@pytest.mark.parametrize("m", SHAPES["GPU_TOKENS"])
@pytest.mark.parametrize("layer", SHAPES["GPU_LAYERS"])
def test_gates_add_a_fraction_of_what_naive_gates_add(layer: str, m: int) -> None:
    """In bytes; tests/test_costs.py says what that and the rest should cost in time."""
    (n, k, bias), size = SHAPES["GPU_LAYERS"][layer], 2
    forward, backward = (
        launch.largest_tile(kernel, 16, "hopper", 132, m, n, k) for kernel in ("fwd", "bwd_x")
    )
    gated = traffic.forward(m, n, k, size, forward).compulsory
    gated += traffic.backward(m, n, k, size, backward).compulsory
    extra = gated - traffic.frozen(m, n, k, size, bias)
    assert 0 < extra < 0.4 * traffic.naive_extra(m, n, k, size)


@pytest.mark.parametrize(
    ("way", "frozen"),
    [("fused", True), ("fused", False), ("fold", True), ("fold", False), ("ordered", True)],
)
def test_launches_of_a_step(way: str, frozen: bool, recorder: Recorder) -> None:
    """Ours, by name; a trained weight adds its kernel, or the fold of its gradient."""
    layer = FusedGatedLinear(150, 160, config=GateConfig(distribution="gaussian"))
    layer.weight.requires_grad_(not frozen)
    if way == "ordered":
        for gate in (layer.row_gate, layer.column_gate):
            assert gate is not None
            gate.logits.data[::2] = -30.0
        layer.reorder_()
    x = torch.randn(65, 150, requires_grad=True)
    chosen = ("a test wants it folded", None) if way == "fold" else (None, "a test wants it fused")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton_gated, "_fold_wins", lambda *_: chosen)
        layer(x).sum().backward()
    model = [
        name
        for names in traffic.LAUNCHES[way].values()
        for name in names
        if name not in traffic.TORCH_LAUNCHES
    ]
    if not frozen:
        after = {"fused": "gated_matmul_bwd_x", "fold": "fold_fwd"}[way]
        at = len(model) - model[::-1].index(after)
        model.insert(at, {"fused": "gated_matmul_bwd_w", "fold": "fold_fwd"}[way])
    assert recorder.launched == model


TALL = 4096
FAR = 2**20
# Per kernel: which operands are there, and which of their strides is the long one.
LONG_STRIDES: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...], dict[str, Any]]] = {
    "fwd": (
        _gated_matmul_fwd_kernel, ("x", "w", "y", "residual"), ("xm", "ym", "residual"),
        {"ROW": "none", "COLUMN": "none", "ACTIVATION": "none"},
    ),
    "bwd_x": (
        gated_matmul_bwd._gated_matmul_bwd_x_kernel,
        ("dy", "w", "x", "y", "dx", "dc", "dr", "db"), ("dym", "xm", "ym"), {"CLOSED_GRAD": True},
    ),
    "bwd_r": (
        gated_matmul_bwd._gated_matmul_bwd_r_kernel, ("dy", "w", "x", "r", "dr"), ("dym", "xm"), {},
    ),
    "bwd_w": (
        gated_matmul_bwd._gated_matmul_bwd_w_kernel,
        ("dy", "x", "w", "dw", "dc", "dr", "db"), ("dym", "xm"), {"CLOSED_GRAD": True},
    ),
    "fold_fwd": (
        fold._fold_fwd_kernel, ("w", "w_out"), ("wn",),
        {"ROW": "none", "COLUMN": "none", "N": TALL},
    ),
    "fold_bwd": (
        fold._fold_bwd_kernel, ("dy", "y", "x", "dx", "dr", "dc"), ("dym", "ym", "xm", "dxm"), {},
    ),
    "norm_gather": (
        norm_gather._norm_gather_fwd_kernel, ("x", "columns", "y"), ("xm",), {"NORM": "rms"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG_STRIDES)
def test_offsets_are_64_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 rows 2²⁰ elements apart: addresses to 2³² elements, computed and not dereferenced."""
    kernel, operands, long, constants = LONG_STRIDES[name]
    lowest, highest = [2**63], [0]
    builder = type(interpreter.interpreter_builder)

    def load(self: Any, ptrs: Any, mask: Any, other: Any, *_: Any, **__: Any) -> Any:
        note(ptrs, mask)
        kind = interpreter._get_np_dtype(ptrs.get_element_ty())
        return interpreter.TensorHandle(np.zeros(ptrs.data.shape, kind), ptrs.get_element_ty())

    def note(ptrs: Any, mask: Any) -> None:
        addresses = ptrs.data[mask.data.astype(bool)].astype(np.uint64)
        if addresses.size:
            lowest[0] = min(lowest[0], int(addresses.min()))
            highest[0] = max(highest[0], int(addresses.max()))

    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(
        builder, "create_masked_store", lambda self, ptrs, value, mask, *_: note(ptrs, mask)
    )
    memory = torch.zeros(1)
    sizes = {"M": TALL, "N": 8, "K": 8, "N_out": 8, "K_in": 8, "count": 8, "eps": 1.0}
    blocks = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "BLOCK": 256}
    given: dict[str, Any] = {"GATHERED": False, "PRECISION": "ieee", **sizes, **blocks}
    given |= {f"{operand}_ptr": memory for operand in operands}
    given["columns_ptr"] = memory.view(torch.int32) if "columns" in operands else None
    given |= {f"stride_{side}": FAR for side in long} | constants
    names = inspect.signature(kernel.fn).parameters
    arguments = {n: given.get(n, None if n.endswith("_ptr") else 1) for n in names}
    programs = {"norm_gather": (TALL,), "bwd_w": (1,)}.get(name, (TALL // 32, 2))
    kernel[programs if name.startswith("fold") else programs[:1]](**arguments)
    assert lowest[0] == memory.data_ptr()
    assert highest[0] - memory.data_ptr() == 4 * ((TALL - 1) * FAR + 7)
