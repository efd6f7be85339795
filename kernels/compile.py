"""Compile the whole launch table ahead of time, without a GPU, and record what it needs.

``python -m finegates.kernels.compile`` prints the rows that differ from ``resources.json``;
``--write`` replaces the file. ``--variant "gated_matmul_fwd[gaussian]" --tile 128,256,64,8,3``
prints what a tile of M, N, K, warps and stages takes, in the launch table or not. Registers, stack
(spills), shared memory, tensor-core instructions and the bytes of every operand's loads and stores
come from the compiled code of each target.
"""

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import fold, gated_matmul, norm_gather, open_mass
from . import gated_matmul_bwd as bwd
from .accesses import accesses
from .launch import (
    ALIGN,
    GATHER_ROWS,
    GEMM,
    OPTIONS,
    REDUCE,
    ROW_WISE,
    STREAM,
    STREAM_ODD,
    SUMS,
    SUMS_ODD,
    Tile,
    gemm_options,
)

RESOURCES = Path(__file__).with_name("resources.json")
Resources = dict[str, Any]


class Target(NamedTuple):
    """A device to compile for, its row of the launch table and its shared memory per block."""

    backend: str
    arch: int | str
    warp: int
    family: str
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, "ampere", 163 * 1024),
    "sm_89": Target("cuda", 89, 32, "consumer", 99 * 1024),
    "sm_90": Target("cuda", 90, 32, "hopper", 227 * 1024),
    "sm_100": Target("cuda", 100, 32, "blackwell", 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, "cdna", 64 * 1024),
}
DTYPES = {"fp16": 16, "bf16": 16, "fp32": 32}
# Pointer arguments whose element type is not the operands'; every other pointer is an operand.
POINTERS = {
    "seed_ptr": "i64",
    **dict.fromkeys(("rows_ptr", "columns_ptr"), "i32"),
    **dict.fromkeys(
        ("r_ptr", "c_ptr", "dr_ptr", "dc_ptr", "db_ptr", "row_logits_ptr", "column_logits_ptr",
         "row_out_ptr", "column_out_ptr", "logits_ptr", "dlogits_ptr", "out_ptr", "dout_ptr"),
        "fp32"),
    "offsets_ptr": "i64",
}  # fmt: skip
FLOATS = ("shift", "scale", "beta", "eps")
_GATES = {"row_logits_ptr": None, "column_logits_ptr": None, "seed_ptr": None}
_DENSE = {"rows_ptr": None, "columns_ptr": None}
_INNER = {"stride_xk": 1, "stride_wk": 1, "stride_dyn": 1}


class Variant(NamedTuple):
    """One specialisation: its row of the launch table or its launch, its constants.

    A pointer that no constant makes None is there. ``few`` is for tokens up to `GATHER_ROWS`, which
    take no tile of twice as many. ``odd`` takes nothing for granted: neither inner strides of 1,
    nor addresses, sizes and strides that are multiples of 16, as `launch.aligned` finds them. With
    ``half`` gate values have the operands' dtype.
    """

    name: str
    kernel: Any
    table: str | dict[str, Any]
    constants: dict[str, Any]
    dtypes: tuple[str, ...] = ("bf16",)
    few: bool = False
    odd: bool = False
    half: bool = False

    @property
    def row(self) -> str | None:
        """The row of `GEMM` that its tiles come from."""
        return self.table.replace("bwd_r", "bwd_x") if isinstance(self.table, str) else None

    @property
    def multiples(self) -> set[str]:
        """The sizes and strides that are multiples of `ALIGN`; the number of tokens never is.

        With index maps neither sizes in feature space are, nor strides of what is gathered and
        scattered by them.
        """
        if self.odd:
            return set()
        names = {"N", "K", "N_out", "K_in"}
        names |= {name for name in self.kernel.arg_names if name.startswith("stride")}
        gathered = self.constants.get("GATHERED", True)
        for side, spread in _SPREAD.get(self.kernel.fn.__name__, {}).items():
            if self.constants.get(side, side) is not None:
                free, by_load = spread
                names -= {*free, *(() if gathered else by_load)}
        return names & set(self.kernel.arg_names)

    def operands(self, dtype: str) -> dict[str, str]:
        """Return the element type of every pointer that is there."""
        pointers = {**POINTERS, **(dict.fromkeys(("r_ptr", "c_ptr"), dtype) if self.half else {})}
        names = (name for name in self.kernel.arg_names if name.endswith("_ptr"))
        return {n: pointers.get(n, dtype) for n in names if n not in self.constants}


# What an index map leaves without alignment: always, and where the GEMM gathers in its own loads.
_SPREAD = {
    "_gated_matmul_fwd_kernel": {
        "rows_ptr": (("N", "N_out", "stride_ym", "stride_residual"), ()),
        "columns_ptr": ((), ("stride_xm",)),
    },
    "_gated_matmul_bwd_x_kernel": {
        "rows_ptr": (("N_out", "stride_ym"), ("stride_dym",)),
        "columns_ptr": (("K_in", "stride_xm"), ()),
    },
    "_gated_matmul_bwd_r_kernel": {
        "rows_ptr": (("N_out", "stride_dym"), ()),
        "columns_ptr": ((), ("stride_xm",)),
    },
    "_gated_matmul_bwd_w_kernel": {
        "rows_ptr": (("N_out",), ()),
        "columns_ptr": (("K_in",), ()),
    },
}
_EVERY = ("fp16", "bf16", "fp32")
_TWO = ("bf16", "fp32")
_SAMPLED = {"residual_ptr": None, "ACTIVATION": "none", "GATHERED": True, **_INNER}
_OPEN = {"ROW": "none", "COLUMN": "none", "r_ptr": None, "c_ptr": None}
_PRUNED = {"ACTIVATION": "gelu", **_OPEN, **_GATES, **_INNER}
_FROZEN = {"CLOSED_GRAD": False, **_INNER}
_LOADED = {"GATHERED": False}
_SUMMED = {"NOISE": True, "CLOSED_GRAD": False, "CLOSED_ROW_GRAD": False,
           "DIVIDE_ROW": True, "DIVIDE_COLUMN": True}  # fmt: skip


def _both(distribution: str) -> dict[str, Any]:
    return {"ROW": distribution, "COLUMN": distribution}


def _fwd(name: str, table: str, constants: dict[str, Any], *rest: Any, **fields: Any) -> Variant:
    kernel = gated_matmul._gated_matmul_fwd_kernel
    fields["odd"] = table.endswith("_odd")
    return Variant(f"gated_matmul_fwd[{name}]", kernel, table, constants, *rest, **fields)


def _bwd(name: str, table: str, constants: dict[str, Any], *rest: Any, **fields: Any) -> Variant:
    """Return a variant of the kernel that a row of the launch table is for."""
    kernel = table.removesuffix("_map").removesuffix("_odd")
    function = getattr(bwd, f"_gated_matmul_{kernel}_kernel")
    fields["odd"] = table.endswith("_odd")
    label = f"[{name}]" if name else ""
    return Variant(f"gated_matmul_{kernel}{label}", function, table, constants, *rest, **fields)


# Every form that a launcher emits is here, or one that has more operands or takes less for
# granted: the interpreter's suite looks at each of its launches. Of each kernel and each row of
# `GEMM` one variant is compiled in all three dtypes, others in one or two.
VARIANTS = (
    _fwd("gaussian", "fwd", {**_both("gaussian"), **_DENSE, **_SAMPLED}, _EVERY),
    _fwd("ranking", "fwd", {**_both("ranking"), "seed_ptr": None, **_DENSE, **_SAMPLED}),
    _fwd("value", "fwd", {**_both("value"), **_GATES, **_DENSE, **_SAMPLED}),
    _fwd("value half", "fwd", {**_both("value"), **_GATES, **_DENSE, **_SAMPLED}, half=True),
    _fwd("tf32", "fwd", {"PRECISION": "tf32", **_both("gaussian"), **_DENSE, **_SAMPLED},
         ("fp32",)),
    _fwd("gaussian columns", "fwd", {**_both("gaussian"), **_SAMPLED, "rows_ptr": None}),
    _fwd("hard_concrete columns", "fwd", {**_both("hard_concrete"), **_SAMPLED, "rows_ptr": None}),
    _fwd("gaussian few", "fwd_map", {**_both("gaussian"), **_SAMPLED, **_LOADED}, few=True),
    _fwd("hard_concrete few", "fwd_map",
         {**_both("hard_concrete"), **_SAMPLED, **_LOADED}, few=True),
    _fwd("gaussian gathered", "fwd_map", {**_both("gaussian"), **_SAMPLED}),
    _fwd("hard_concrete gathered", "fwd_map", {**_both("hard_concrete"), **_SAMPLED}),
    _fwd("pruned few", "fwd_map", {**_PRUNED, **_LOADED}, _TWO, few=True),
    _fwd("scatter", "fwd_map", {**_PRUNED, "GATHERED": True}, _EVERY),
    _fwd("gaussian odd", "fwd_odd", {**_both("gaussian"), "ACTIVATION": "gelu", **_LOADED}, _EVERY),
    _fwd("gaussian gathered odd", "fwd_odd",
         {**_both("gaussian"), "ACTIVATION": "gelu", "GATHERED": True}),
    _fwd("hard_concrete odd", "fwd_odd",
         {**_both("hard_concrete"), "ACTIVATION": "gelu", **_LOADED}),
    _fwd("hard_concrete gathered odd", "fwd_odd",
         {**_both("hard_concrete"), "ACTIVATION": "gelu", "GATHERED": True}),
    _fwd("value odd", "fwd_odd",
         {**_both("value"), **_GATES, "ACTIVATION": "none", "GATHERED": True}),
    _fwd("value half odd", "fwd_odd",
         {**_both("value"), **_GATES, "ACTIVATION": "none", "GATHERED": True}, half=True),
    _bwd("", "bwd_x", {**_FROZEN, **_DENSE, "GATHERED": True}, _EVERY),
    _bwd("half", "bwd_x", {**_FROZEN, **_DENSE, "GATHERED": True}, half=True),
    _bwd("tf32", "bwd_x", {"PRECISION": "tf32", **_FROZEN, **_DENSE, "GATHERED": True}, ("fp32",)),
    _bwd("closed", "bwd_x", {**_FROZEN, **_DENSE, "GATHERED": True, "CLOSED_GRAD": True}),
    _bwd("few", "bwd_x_map", {**_FROZEN, **_LOADED}, _TWO, few=True),
    _bwd("gathered", "bwd_x_map", {**_FROZEN, "GATHERED": True}, _EVERY),
    _bwd("odd", "bwd_x_odd", {"CLOSED_GRAD": False, **_LOADED}, _EVERY),
    _bwd("half odd", "bwd_x_odd", {"CLOSED_GRAD": False, "GATHERED": True}, half=True),
    _bwd("gathered odd", "bwd_x_odd", {"CLOSED_GRAD": False, "GATHERED": True}),
    _bwd("", "bwd_r", {**_DENSE, **_INNER, "GATHERED": True}, _EVERY),
    _bwd("few", "bwd_r_map", {**_INNER, **_LOADED}, _TWO, few=True),
    _bwd("gathered", "bwd_r_map", {**_INNER, "GATHERED": True}, _EVERY),
    _bwd("odd", "bwd_r_odd", _LOADED, _EVERY),
    _bwd("half odd", "bwd_r_odd", {"GATHERED": True}, half=True),
    _bwd("gathered odd", "bwd_r_odd", {"GATHERED": True}),
    _bwd("", "bwd_w", {**_FROZEN, **_DENSE}, _EVERY),
    _bwd("tf32", "bwd_w", {"PRECISION": "tf32", **_FROZEN, **_DENSE}, ("fp32",)),
    _bwd("closed", "bwd_w", {**_FROZEN, **_DENSE, "CLOSED_GRAD": True}),
    _bwd("mapped", "bwd_w", _FROZEN),
    _bwd("odd", "bwd_w_odd", {"CLOSED_GRAD": False}, _EVERY),
    _bwd("half odd", "bwd_w_odd", {"CLOSED_GRAD": False}, half=True),
    *(
        Variant(f"gated_matmul_bwd_gates[{distribution}]", bwd._gated_matmul_bwd_gates_kernel,
                REDUCE, {"DISTRIBUTION": distribution, **_SUMMED},
                _EVERY if distribution == "gaussian" else ("bf16",), odd=True)
        for distribution in ("gaussian", "hard_concrete", "ranking", "value")
    ),
    Variant("gated_matmul_bwd_gates[value half]", bwd._gated_matmul_bwd_gates_kernel, REDUCE,
            {"DISTRIBUTION": "value", **_SUMMED}, odd=True, half=True),
    *(
        Variant(f"fold_fwd[{distribution}]", fold._fold_fwd_kernel, STREAM,
                {**_both(distribution), **_INNER},
                _EVERY if distribution == "gaussian" else ("bf16",))
        for distribution in ("gaussian", "hard_concrete", "ranking", "value")
    ),
    *(
        Variant(f"fold_fwd[{distribution} odd]", fold._fold_fwd_kernel, STREAM_ODD,
                _both(distribution), odd=True)
        for distribution in ("gaussian", "hard_concrete", "value")
    ),
    Variant("fold_bwd", fold._fold_bwd_kernel, SUMS, _INNER, _EVERY),
    Variant("fold_bwd[odd]", fold._fold_bwd_kernel, SUMS_ODD, {}, _EVERY, odd=True),
    *(
        Variant(f"norm_gather_fwd[{norm}]", norm_gather._norm_gather_fwd_kernel, ROW_WISE,
                {"NORM": norm}, _EVERY if norm == "rms" else ("bf16",), odd=True)
        for norm in ("none", "rms", "layer")
    ),
    *(
        Variant(f"open_mass_{way}[{distribution}]", kernel, ROW_WISE,
                {"DISTRIBUTION": distribution}, ("fp32",))
        for way, kernel in (
            ("fwd", open_mass._open_mass_fwd_kernel), ("bwd", open_mass._open_mass_bwd_kernel)
        )
        for distribution in ("gaussian", "hard_concrete", "ranking")
    ),
)  # fmt: skip


class Job(NamedTuple):
    """One row of the resource table."""

    variant: int
    target: str
    dtype: str
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Return "kernel[variant] target dtype MxNxK warps stages"."""
        options = self.options
        sizes = [str(value) for name, value in options.items() if name.startswith("BLOCK")]
        launch = f"{'x'.join(sizes)} w{options['num_warps']} s{options.get('num_stages', 3)}"
        return f"{VARIANTS[self.variant].name} {self.target} {self.dtype} {launch}"


def jobs(targets: Iterable[str] = TARGETS) -> list[Job]:
    """Return every variant × target × dtype × tile of the launch table."""
    listed = []
    for target in targets:
        for index, variant in enumerate(VARIANTS):
            if "[tf32]" in variant.name and target == "gfx942":
                continue  # the CDNA table has no tf32
            for dtype in variant.dtypes:
                if not isinstance(variant.table, str):
                    listed.append(Job(index, target, dtype, {**variant.table, **OPTIONS}))
                    continue
                for tile in GEMM[variant.row, DTYPES[dtype]][TARGETS[target].family]:
                    if variant.few and tile.m >= 2 * GATHER_ROWS:
                        continue
                    if variant.table.startswith("bwd_r"):
                        tile = bwd.bwd_r_tile(tile)
                    listed.append(Job(index, target, dtype, gemm_options(tile)))
    return list({job.key: job for job in listed}.values())


def trials(name: str, tile: Tile, targets: Iterable[str] = TARGETS) -> list[Job]:
    """Return the jobs of a variant of a GEMM with any tile, in each of its dtypes."""
    index = [variant.name for variant in VARIANTS].index(name)
    if VARIANTS[index].row is None:
        raise ValueError(f"{name} takes no tile")
    dtypes = VARIANTS[index].dtypes
    return [Job(index, target, dtype, gemm_options(tile)) for target in targets for dtype in dtypes]


def compile_job(job: Job) -> Resources:
    """Compile one row and return what the code needs."""
    variant, target = VARIANTS[job.variant], TARGETS[job.target]
    blocks = {name: value for name, value in job.options.items() if name.isupper()}
    options = {name: value for name, value in job.options.items() if not name.isupper()}
    constants = {"PRECISION": "ieee", **variant.constants, **blocks}
    names = variant.kernel.arg_names
    types = variant.operands(job.dtype)
    signature = {name: _type_of(name, types, constants) for name in names}
    known = set() if variant.odd else {*types, *variant.multiples}
    attributes = {
        (position,): [["tt.divisibility", ALIGN]]
        for position, name in enumerate(names)
        if name in known and name not in constants
    }
    present = {name: value for name, value in constants.items() if name in names}
    source = ASTSource(variant.kernel, signature, present, attributes)
    gpu = GPUTarget(target.backend, target.arch, target.warp)
    compiled = triton.compile(source, target=gpu, options=options)
    given = [name.removesuffix("_ptr") for name in names if signature[name] != "constexpr"]
    loads, stores = accesses(compiled.asm["llir"], given)
    measure = _measure_hip if target.backend == "hip" else _measure_cuda
    found = {"shared": compiled.metadata.shared, **measure(compiled.asm)}
    return {**found, "loads": loads, "stores": stores}


def _type_of(name: str, types: dict[str, str], constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in types:
        return "*" + types[name]
    return "fp32" if name in FLOATS else "i32"


def _measure_cuda(asm: dict[str, Any]) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump reports no usage: {usage!r}")
    ptx = asm["ptx"]
    return {
        "registers": int(found[1]),
        "spills": int(found[2]),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\bmma\.sync|tcgen05\.mma", ptx)),
    }


def _measure_hip(asm: dict[str, Any]) -> dict[str, int]:
    code = asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "wgmma": 0,
        "mma": len(re.findall(r"v_mfma", code)),
    }


@contextmanager
def compiling(
    listed: Iterable[Job], processes: int | None = None
) -> Iterator[dict[str, Future[Resources]]]:
    """Compile jobs in their order in processes of their own, one a core unless said otherwise.

    Yields key → what will be known of it; what nobody has waited for by the end is dropped.
    """
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        yield {job.key: pool.submit(compile_job, job) for job in listed}
    finally:
        pool.shutdown(cancel_futures=True)


def committed_rows() -> dict[str, Resources]:
    """Return the committed table's rows."""
    rows: dict[str, Resources] = json.loads(RESOURCES.read_text())["rows"]
    return rows


def main() -> int:
    """Compare with the committed table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace resources.json")
    parser.add_argument("--processes", type=int, help="default: one a core")
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--variant", choices=[variant.name for variant in VARIANTS])
    parser.add_argument("--tile", type=lambda text: Tile(*map(int, text.split(","))))
    arguments = parser.parse_args()
    targets = arguments.target or TARGETS
    if (arguments.variant is None) != (arguments.tile is None):
        parser.error("--variant and --tile go together")
    if arguments.tile is not None:
        for job in trials(arguments.variant, arguments.tile, targets):
            sys.stdout.write(f"{job.key}: {compile_job(job)}\n")
        return 0
    with compiling(jobs(targets), arguments.processes) as futures:
        measured = {key: future.result() for key, future in futures.items()}
    committed = committed_rows() if RESOURCES.exists() else {}
    changed = {key: row for key, row in measured.items() if committed.get(key) != row}
    if arguments.write:
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in measured.items())
        RESOURCES.write_text(f'{{"triton": "{triton.__version__}", "rows": {{\n{lines}\n}}}}\n')
    for key, row in changed.items():
        sys.stdout.write(f"{key}: {row}, was {committed.get(key)}\n")
    return 0 if arguments.write else int(bool(changed))


if __name__ == "__main__":
    raise SystemExit(main())
