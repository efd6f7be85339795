"""Loads, stores and launches counted in the interpreter, against kernels/traffic.py."""

from __future__ import annotations

import dataclasses
import re
import runpy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gpu_layers
import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from finegates import FusedGatedLinear, GateConfig
from finegates.kernels import fold, gated_matmul, launch, norm_gather, open_mass, traffic
from finegates.kernels import gated_matmul_bwd as bwd
from finegates.kernels.operands import Gates, Weight
from finegates.ops import _triton_gated, dispatch
from finegates.surgery.shrink import held_of
from gated_case import FROZEN, PRETRAINING, make
from launches import Launches

ROOT = Path(__file__).parents[2]
SHAPES = runpy.run_path(str(ROOT / "bench" / "shapes.py"))


class Recorder:
    """Bytes that the interpreter's programs load and store, by the tensor they belong to."""

    def __init__(self) -> None:
        self.accesses: list[tuple[str, np.ndarray, int]] = []

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

    def by_tensor(self, tensors: dict[str, Tensor]) -> dict[str, traffic.Flow]:
        """Return distinct and issued bytes of each tensor; an address outside all fails."""
        issued: dict[str, Counter[str]] = {name: Counter() for name in tensors}
        touched: dict[str, list[np.ndarray]] = {name: [] for name in tensors}
        for kind, addresses, width in self.accesses:
            placed = 0
            for name, tensor in tensors.items():
                start = tensor.data_ptr()
                end = start + tensor.untyped_storage().nbytes()
                inside = addresses[(addresses >= start) & (addresses < end)]
                placed += len(inside)
                if len(inside):
                    issued[name][kind] += len(inside) * width
                    touched[name].append(np.stack((inside, np.full_like(inside, width))))
            assert placed == len(addresses), f"{kind} outside every tensor"
        flows = {}
        for name, parts in touched.items():
            addresses, widths = np.concatenate([np.empty((2, 0), np.uint64), *parts], 1)
            _, first = np.unique(addresses, return_index=True)
            distinct = int(widths[first].sum())
            flows[name] = traffic.Flow(distinct, issued[name]["load"], issued[name]["store"])
        return flows


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    record = Recorder()
    builder = type(interpreter.interpreter_builder)
    load, store = builder.create_masked_load, builder.create_masked_store

    def recorded_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        record.note("load", ptrs, mask)
        return load(self, ptrs, mask, *rest, **kwargs)

    def recorded_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record.note("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", recorded_load)
    monkeypatch.setattr(builder, "create_masked_store", recorded_store)
    return record


class Counted(NamedTuple):
    """A launch that was made: its kernel, its model, and its operands by the model's names."""

    kernel: str
    model: traffic.Traffic
    tensors: dict[str, Tensor]


class Operands:
    """Open gates and operands of one layer, and the launches that a test counts.

    Of a compact weight the kept rows and columns are ``n`` and ``k`` of 1.5 times as many features.
    """

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype) -> None:
        self.sizes = (m, n, k, dtype.itemsize)
        self.dtype = dtype
        self.case = open_case(m, n, k, dtype)
        self.wide = (n + n // 2, k + k // 2)
        self.rows, self.columns = (
            torch.randperm(wide)[:size].sort().values.int()
            for wide, size in zip(self.wide, (n, k), strict=True)
        )

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.dtype)

    def tile(self, kernel: str) -> launch.Tile:
        return launch.gemm_tile(kernel, self.case.x, *self.sizes[:3])

    @property
    def block(self) -> int:
        """Columns of w that a program of the fold takes."""
        whole = launch.aligned(self.sizes[1:3], (self.case.w, None))
        return (launch.STREAM if whole else launch.STREAM_ODD)["BLOCK"]

    @property
    def values(self) -> Gates:
        _, n, k, _ = self.sizes
        return Gates(row="value", column="value", r=torch.full((n,), 0.5), c=torch.full((k,), 0.5))

    def forward(self) -> Counted:
        y, r, c = _triton_gated.gated_matmul_fused(self.case.call())
        model = traffic.forward(*self.sizes, self.tile("fwd"))
        tensors = {**tensors_of(self.case), "y": y, "r": r, "c": c}
        return Counted("gated_matmul_fwd", model, tensors)

    def pruned(self, gathered: bool, residual: bool = False) -> Counted:
        m, n, k, size = self.sizes
        n_out, k_in = self.wide
        x, b = self.draw(m, k_in), self.draw(n)
        added = self.draw(m, n_out) if residual else None
        weight = Weight(self.case.w, b, self.rows, self.columns)
        with gathers(gated_matmul, gathered) as read:
            y = gated_matmul.gated_matmul_fwd(x, weight, Gates(), n_out, residual=added)
        tile = self.tile("fwd_map")
        model = traffic.pruned(m, n, k, n_out, size, tile, gathered, residual)
        tensors = {"x": read[0], "w": weight.w, "b": b, "rows": self.rows, "y": y}
        tensors |= {} if gathered else {"columns": self.columns}
        return Counted(
            "gated_matmul_fwd", model, tensors | ({"residual": added} if residual else {})
        )

    def backward(self) -> Counted:
        m, n, _, _ = self.sizes
        dy, y, x, w, gates = self.draw(m, n), self.draw(m, n), self.case.x, self.case.w, self.values
        dx, dc, dr, db = bwd.gated_matmul_bwd_x(dy, x, y, Weight(w), gates, (True,) * 4)
        tensors = {"dy": dy, "w": w, "x": x, "y": y, "r": gates.r, "c": gates.c}
        tensors |= {"dx": dx, "dc": dc, "dr": dr, "db": db}
        model = traffic.backward(*self.sizes, self.tile("bwd_x"))
        return Counted("gated_matmul_bwd_x", model, tensors)

    def compact_backward(self, gathered: bool) -> Counted:
        m, n, k, size = self.sizes
        n_out, k_in = self.wide
        dy, y, x = self.draw(m, n_out), self.draw(m, n_out), self.draw(m, k_in)
        weight = Weight(self.case.w, None, self.rows, self.columns)
        with gathers(bwd, gathered) as read:
            dx, dc, dr, db = bwd.gated_matmul_bwd_x(dy, x, y, weight, Gates(), (True,) * 4)
        model = traffic.compact_backward(m, n, k, k_in, size, self.tile("bwd_x_map"), gathered)
        tensors = {"dy": read[0], "w": weight.w, "x": x, "y": y}
        tensors |= {"rows": self.rows, "columns": self.columns}
        return Counted(
            "gated_matmul_bwd_x", model, tensors | {"dx": dx, "dc": dc, "dr": dr, "db": db}
        )

    def closed_rows(self) -> Counted:
        m, n, _, _ = self.sizes
        tile = bwd.bwd_r_tile(self.tile("bwd_x"))
        gates = self.values._replace(r=torch.zeros(n))
        dy, dr = self.draw(m, n), torch.empty(launch.cdiv(m, tile.m), n)
        weight = Weight(self.case.w, self.case.b)
        bwd.gated_matmul_bwd_r(dy, self.case.x, dr, weight, gates)
        tensors = {"x": self.case.x, "w": weight.w, "b": weight.b, "dy": dy}
        tensors |= {"r": gates.r, "c": gates.c, "dr": dr}
        return Counted("gated_matmul_bwd_r", traffic.closed_rows(*self.sizes, tile), tensors)

    def weight_gradient(self) -> Counted:
        m, n, _, _ = self.sizes
        dy, gates, weight = self.draw(m, n), self.values, Weight(self.case.w, self.case.b)
        dw, dc, dr, db = bwd.gated_matmul_bwd_w(dy, self.case.x, weight, gates, (True,) * 3)
        tensors = {"dy": dy, "x": self.case.x, "w": weight.w, "b": weight.b}
        tensors |= {"r": gates.r, "c": gates.c, "dw": dw, "dc": dc, "dr": dr, "db": db}
        model = traffic.weight_gradient(*self.sizes, self.tile("bwd_w"))
        return Counted("gated_matmul_bwd_w", model, tensors)

    def second_stage(self) -> Counted:
        _, n, k, size = self.sizes
        tiles, case = (35, 3), self.case  # two blocks of tiles, and one
        dr, dc, db = torch.randn(35, n), torch.randn(3, k), torch.randn(35, n)
        gates = _triton_gated._drawn_gates(
            case.call(), torch.full((n,), 0.5), torch.full((k,), 0.5)
        )
        drow, dcolumn, dbias = bwd.gated_matmul_bwd_gates(
            dr, dc, db, Weight(case.w, case.b), gates, True
        )
        tensors = {"dr": dr, "dc": dc, "db": db, "r": gates.r, "c": gates.c}
        tensors |= {"row_logits": case.row_logits, "column_logits": case.column_logits}
        tensors |= {"drow_logits": drow, "dcolumn_logits": dcolumn, "dbias": dbias}
        model = traffic.second_stage(n, k, size, *tiles)
        return Counted("gated_matmul_bwd_gates", model, tensors)

    def fold(self) -> Counted:
        gates = _triton_gated._sampled_gates(self.case.call())
        folded, bias = fold.fold_fwd(self.case.w, self.case.b, gates)
        tensors = tensors_of(self.case)
        del tensors["x"]
        tensors |= {"folded": folded, "folded_bias": bias, "r": gates.r, "c": gates.c}
        return Counted("fold_fwd", traffic.fold(*self.sizes[1:], self.block), tensors)

    def fold_again(self) -> Counted:
        gates = self.values
        folded, _ = fold.fold_fwd(self.case.w, None, gates)
        tensors = {"w": self.case.w, "r": gates.r, "c": gates.c, "folded": folded}
        return Counted("fold_fwd", traffic.fold_again(*self.sizes[1:], self.block), tensors)

    def folded_sums(self) -> Counted:
        m, n, k, _ = self.sizes
        dy, y, dx, x = self.draw(m, n), self.draw(m, n), self.draw(m, k), self.case.x
        dr, dc, db = fold.fold_bwd(dy, y, x, dx, (True,) * 3)
        tensors = {"dy": dy, "y": y, "x": x, "dx": dx, "dr": dr, "dc": dc, "db": db}
        return Counted("fold_bwd", traffic.folded_sums(*self.sizes), tensors)

    def norm_gather(self, norm: str) -> Counted:
        m, _, k, size = self.sizes
        x, weight, bias = (
            self.draw(m, self.wide[1]),
            self.draw(self.wide[1]),
            self.draw(self.wide[1]),
        )
        y = norm_gather.norm_gather_fwd(x, self.columns, weight, bias, 1e-6, norm)
        tensors = {"x": x, "columns": self.columns, "weight": weight, "bias": bias, "y": y}
        model = traffic.norm_gather(m, self.wide[1], k, size, norm)
        return Counted("norm_gather_fwd", model, tensors)

    def open_mass(self) -> Counted:
        logits, offsets = self.gates_of_a_model()
        out = open_mass.open_mass_fwd(logits, offsets, "gaussian", 0.5, 0.5)
        model = traffic.open_mass(len(logits), len(offsets) - 1)
        return Counted("open_mass_fwd", model, {"logits": logits, "offsets": offsets, "out": out})

    def open_mass_backward(self) -> Counted:
        logits, offsets = self.gates_of_a_model()
        dout = torch.randn(len(offsets) - 1)
        dlogits = open_mass.open_mass_bwd(dout, logits, offsets, "gaussian", 0.5, 0.5)
        model = traffic.open_mass_backward(len(logits), len(dout))
        tensors = {"dout": dout, "logits": logits, "offsets": offsets, "dlogits": dlogits}
        return Counted("open_mass_bwd", model, tensors)

    def gates_of_a_model(self) -> tuple[Tensor, Tensor]:
        m, n, k, _ = self.sizes
        offsets = torch.tensor([0, n, n + k, n + k + m])
        return torch.randn(int(offsets[-1])), offsets


@contextmanager
def gathers(module: Any, gathered: bool) -> Iterator[list[Tensor]]:
    """Let torch gather before a GEMM, or leave it to its loads; yield what the GEMM reads.

    The gather is a kernel of its own, with a model of its own.
    """
    read: list[Tensor] = []

    def gather(x: Tensor, columns: Tensor) -> tuple[Tensor, bool]:
        read.append(x[:, columns.long()] if gathered else x)
        return read[0], gathered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "gather_columns", gather)
        yield read


def open_case(m: int, n: int, k: int, dtype: torch.dtype) -> Any:
    case = make(m, n, k, dtype)
    case.row_logits.fill_(0.4)
    case.column_logits.fill_(0.4)
    return case


MODELS: dict[str, Callable[[Operands], Counted]] = {
    "forward": Operands.forward,
    "pruned": lambda given: given.pruned(gathered=True),
    "pruned, few tokens": lambda given: given.pruned(gathered=False),
    "pruned, residual": lambda given: given.pruned(gathered=True, residual=True),
    "backward": Operands.backward,
    "compact backward": lambda given: given.compact_backward(gathered=True),
    "compact backward, few tokens": lambda given: given.compact_backward(gathered=False),
    "closed rows": Operands.closed_rows,
    "weight gradient": Operands.weight_gradient,
    "second stage": Operands.second_stage,
    "fold": Operands.fold,
    "fold again": Operands.fold_again,
    "folded sums": Operands.folded_sums,
    "gather": lambda given: given.norm_gather("none"),
    "RMSNorm + gather": lambda given: given.norm_gather("rms"),
    "LayerNorm + gather": lambda given: given.norm_gather("layer"),
    "open mass": Operands.open_mass,
    "open mass backward": Operands.open_mass_backward,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(64, 128, 192), (33, 70, 600), (1, 65, 64)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_of_the_model(
    name: str, shape: Any, dtype: torch.dtype, recorder: Recorder, launches: Launches
) -> None:
    """Every load and store of one launch, by argument; nothing lies outside the arguments."""
    given = Operands(*shape, dtype)
    kernel, model, tensors = MODELS[name](given)
    assert recorder.by_tensor(tensors) == model
    assert [launched for launched, _ in launches.kernels] == [kernel]


def test_every_kernel_has_a_model() -> None:
    given = Operands(1, 65, 64, torch.float32)
    source = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    kernels = set(re.findall(r"^def _(\w+)_kernel\(", source, re.MULTILINE))
    assert {model(given).kernel for model in MODELS.values()} == kernels


def test_closed_tiles_are_not_read(recorder: Recorder) -> None:
    """Of 3 tiles of columns 2 are closed, of 2 tiles of rows 1: a sixth of x and of w is read."""
    m, n, k = 64, 128, 192
    case = open_case(m, n, k, torch.float32)
    case.row_logits[64:], case.column_logits[64:] = -9.0, -9.0
    y, r, c = _triton_gated.gated_matmul_fused(case.call())
    flows = recorder.by_tensor(named := {**tensors_of(case), "y": y, "r": r, "c": c})
    assert flows["x"].loads == 4 * m * 64
    assert flows["w"].loads == (m // 32) * 4 * 64 * 64
    recorder.accesses.clear()
    dy = torch.randn(m, n)
    dx, dc, dr, db = bwd.gated_matmul_bwd_x(
        dy, case.x, y, Weight(case.w), Gates(r=r, c=c), (True,) * 4
    )
    flows = recorder.by_tensor({**named, "dy": dy, "dx": dx, "dc": dc, "dr": dr, "db": db})
    assert flows["w"].loads == (m // 32) * 4 * 64 * 64
    assert flows["x"].loads == 4 * m * 64


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
    gated = traffic.compulsory(traffic.forward(m, n, k, size, forward))
    gated += traffic.compulsory(traffic.backward(m, n, k, size, backward))
    extra = gated - traffic.frozen(m, n, k, size, bias)
    assert 0 < extra < 0.4 * traffic.naive_extra(m, n, k, size)


@pytest.fixture
def step_launches(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Watch the inside of our ops too."""
    choose = dispatch.choose

    def watched(*args: Any) -> dispatch.Implementation:
        entry = choose(*args)

        def inside(*operands: Any) -> Any:
            with launches:
                return entry.run(*operands)

        return dataclasses.replace(entry, run=inside)

    monkeypatch.setattr(dispatch, "choose", watched)
    return launches


@pytest.mark.parametrize("way", traffic.LAUNCHES)
def test_launches_of_a_step(way: str, step_launches: Launches) -> None:
    """Ours and torch's, by name and in order, forward and backward."""
    ranking = way.startswith(("compact", "gradient"))
    config = GateConfig(
        distribution="ranking" if ranking else "gaussian",
        closed_gradient=way.startswith("gradient"),
    )
    layer = FusedGatedLinear(150, 170, config=config)
    layer.weight.requires_grad_("trained" in way)
    if way.startswith(("ordered", "compact")):
        for gate in (layer.row_gate, layer.column_gate):
            assert gate is not None
            gate.logits.data[::2] = -30.0
    if way.startswith("ordered"):
        layer.reorder_()
    if way.startswith("compact"):
        layer.shrink_(*(held_of(g.value() > 0, 16) for g in (layer.row_gate, layer.column_gate)))
        layer(torch.randn(65, 150))  # the maps are looked at once
    x, dy = torch.randn(65, 150, requires_grad=True), torch.randn(65, 170)
    names = step_launches.names
    names.clear()
    with gpu_layers.chosen("fold" if "folded" in way else "fused"), step_launches:
        y = layer(x)
        forward = len(names)
        y.backward(dy)
    assert tuple(
        tuple(name for name in part if not name.startswith("finegates."))
        for part in (names[:forward], names[forward:])
    ) == traffic.LAUNCHES[way]  # fmt: skip


@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
def test_naive_gates_launch_more_than_thirty(distribution: str) -> None:
    config = GateConfig(distribution=distribution)
    layer = gpu_layers.make((66, 70, True), 33, torch.float32, config, "cpu")
    with Launches() as launches:
        torch.autograd.grad(layer.naive(), list(layer.trained.values()), layer.dy)
    assert len(launches.names) > 30
