"""Compile the whole launch table ahead of time, without a GPU, and record what it needs.

``python -m finegates.kernels.compile`` prints the rows that differ from ``resources.json``;
``--write`` replaces the file. Registers, stack (spills), shared memory, global loads of 16 and of
2 bytes and tensor-core instructions come from the compiled code of each target.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import fold, gated_matmul, norm_gather, open_mass
from . import gated_matmul_bwd as bwd
from .launch import GATHER_ROWS, GEMM, OPTIONS, REDUCE, ROW_WISE, STREAM, SUMS, gemm_options

RESOURCES = Path(__file__).with_name("resources.json")


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
    take no tile of twice as many; ``divisible`` says that sizes and strides are multiples of 16, as
    the models' are.
    """

    name: str
    kernel: Any
    table: str | dict[str, Any]
    constants: dict[str, Any]
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    few: bool = False
    divisible: bool = True


_EVERY = ("fp16", "bf16", "fp32")
_16 = ("bf16",)
_SAMPLED = {"residual_ptr": None, "ACTIVATION": "none", "GATHERED": False, **_INNER}
_OPEN = {"ROW": "none", "COLUMN": "none", "r_ptr": None, "c_ptr": None}
_PRUNED = {"ACTIVATION": "gelu", **_OPEN, **_GATES, **_INNER}
_FROZEN = {"CLOSED_GRAD": False, **_INNER}
_CLOSED = {"CLOSED_GRAD": True, **_INNER}
_COMPACT = {"r_ptr": None, "c_ptr": None, **_CLOSED}
_SUMMED = {"NOISE": True, "CLOSED_GRAD": False, "CLOSED_ROW_GRAD": False,
           "DIVIDE_ROW": True, "DIVIDE_COLUMN": True}  # fmt: skip


def _both(distribution: str) -> dict[str, Any]:
    return {"ROW": distribution, "COLUMN": distribution}


def _fwd(name: str, table: str, constants: dict[str, Any], *rest: Any, **fields: Any) -> Variant:
    kernel = gated_matmul._gated_matmul_fwd_kernel
    return Variant(f"gated_matmul_fwd[{name}]", kernel, table, constants, *rest, **fields)


def _bwd(name: str, table: str, constants: dict[str, Any], *rest: Any, **fields: Any) -> Variant:
    """Return a variant of the kernel that a row of the launch table is for."""
    kernel = table.removesuffix("_map").removesuffix("_odd")
    function = getattr(bwd, f"_gated_matmul_{kernel}_kernel")
    label = f"[{name}]" if name else ""
    return Variant(f"gated_matmul_{kernel}{label}", function, table, constants, *rest, **fields)


# Every form that a launcher emits is here, or one with more operands is: the interpreter's suite
# looks at each of its launches. fp16 takes bf16's tiles and differs by a few registers where both
# are compiled, so that one variant of a kernel has it, not every row of the launch table.
VARIANTS = (
    _fwd("gaussian", "fwd", {**_both("gaussian"), **_DENSE, **_SAMPLED}, _EVERY),
    _fwd("hard_concrete", "fwd", {**_both("hard_concrete"), **_DENSE, **_SAMPLED}),
    _fwd("ranking", "fwd", {**_both("ranking"), "seed_ptr": None, **_DENSE, **_SAMPLED}),
    _fwd("value", "fwd", {**_both("value"), **_GATES, **_DENSE, **_SAMPLED}),
    _fwd("tf32", "fwd", {"PRECISION": "tf32", **_both("gaussian"), **_DENSE, **_SAMPLED},
         ("fp32",)),
    _fwd("gaussian few", "fwd_map", {**_both("gaussian"), **_SAMPLED}, few=True),
    _fwd("hard_concrete few", "fwd_map", {**_both("hard_concrete"), **_SAMPLED}, _16, few=True),
    _fwd("ranking few", "fwd_map",
         {**_both("ranking"), "seed_ptr": None, **_SAMPLED}, _16, few=True),
    _fwd("gaussian rows", "fwd_map", {**_both("gaussian"), **_SAMPLED, "columns_ptr": None}, _16),
    _fwd("gaussian columns", "fwd",
         {**_both("gaussian"), **_SAMPLED, "rows_ptr": None, "GATHERED": True}, _16),
    _fwd("gaussian gathered", "fwd_map", {**_both("gaussian"), **_SAMPLED, "GATHERED": True}),
    _fwd("hard_concrete gathered", "fwd_map",
         {**_both("hard_concrete"), **_SAMPLED, "GATHERED": True}, _16),
    _fwd("pruned few", "fwd_map", {"GATHERED": False, **_PRUNED}, few=True),
    _fwd("pruned rows", "fwd_map", {"GATHERED": False, "columns_ptr": None, **_PRUNED}, _16),
    _fwd("scatter", "fwd_map", {"GATHERED": True, **_PRUNED}, _EVERY),
    _fwd("scatter odd", "fwd_map", {"GATHERED": True, **_PRUNED}, _16, divisible=False),
    _bwd("", "bwd_x", {"GATHERED": False, **_FROZEN, **_DENSE}, _EVERY),
    _bwd("tf32", "bwd_x", {"PRECISION": "tf32", "GATHERED": False, **_FROZEN, **_DENSE},
         ("fp32",)),
    _bwd("closed", "bwd_x", {"GATHERED": False, **_CLOSED, **_DENSE}),
    _bwd("few", "bwd_x_map", {"GATHERED": False, **_FROZEN}, few=True),
    _bwd("few closed", "bwd_x_map", {"GATHERED": False, **_CLOSED}, _16, few=True),
    _bwd("columns", "bwd_x_map", {"GATHERED": False, "rows_ptr": None, **_FROZEN}, _16),
    _bwd("gathered", "bwd_x_map", {"GATHERED": True, **_FROZEN}),
    _bwd("compact", "bwd_x_map", {"GATHERED": True, **_COMPACT}),
    _bwd("compact odd", "bwd_x_map", {"GATHERED": True, **_COMPACT}, _16, divisible=False),
    _bwd("", "bwd_r", {"GATHERED": False, **_DENSE, **_INNER}, _EVERY),
    _bwd("few", "bwd_r_map", {"GATHERED": False, **_INNER}, _16, few=True),
    _bwd("gathered", "bwd_r_map", {"GATHERED": True, **_INNER}, _16),
    _bwd("", "bwd_w", {**_FROZEN, **_DENSE}, _EVERY),
    _bwd("tf32", "bwd_w", {"PRECISION": "tf32", **_FROZEN, **_DENSE}, ("fp32",)),
    _bwd("closed", "bwd_w", {**_CLOSED, **_DENSE}, _16),
    _bwd("mapped", "bwd_w", _FROZEN),
    _bwd("mapped closed", "bwd_w", _CLOSED, _16),
    _bwd("compact odd", "bwd_w_odd", _COMPACT, divisible=False),
    *(
        Variant(f"gated_matmul_bwd_gates[{distribution}]", bwd._gated_matmul_bwd_gates_kernel,
                REDUCE, {"DISTRIBUTION": distribution, **_SUMMED},
                _EVERY if distribution == "gaussian" else _16)
        for distribution in ("gaussian", "hard_concrete", "ranking", "value")
    ),
    *(
        Variant(f"fold_fwd[{distribution}]", fold._fold_fwd_kernel, STREAM,
                {**_both(distribution), **_INNER},
                _EVERY if distribution == "gaussian" else _16)
        for distribution in ("gaussian", "hard_concrete", "ranking", "value")
    ),
    Variant("fold_bwd", fold._fold_bwd_kernel, SUMS, _INNER, _EVERY),
    *(
        Variant(f"norm_gather_fwd[{norm}]", norm_gather._norm_gather_fwd_kernel, ROW_WISE,
                {"NORM": norm, **_INNER}, _EVERY if norm == "rms" else _16)
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
                table = variant.table.replace("bwd_r", "bwd_x")
                for tile in GEMM[table, DTYPES[dtype]][TARGETS[target].family]:
                    if variant.few and tile.m >= 2 * GATHER_ROWS:
                        continue
                    if variant.table.startswith("bwd_r"):
                        tile = bwd.bwd_r_tile(tile)
                    listed.append(Job(index, target, dtype, gemm_options(tile)))
    return list({job.key: job for job in listed}.values())


def compile_job(job: Job) -> dict[str, int]:
    """Compile one row and return what the code needs."""
    variant, target = VARIANTS[job.variant], TARGETS[job.target]
    blocks = {name: value for name, value in job.options.items() if name.isupper()}
    options = {name: value for name, value in job.options.items() if not name.isupper()}
    constants = {"PRECISION": "ieee", **variant.constants, **blocks}
    names = variant.kernel.arg_names
    signature = {name: _type_of(name, job.dtype, constants) for name in names}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if signature[name].startswith("*")
        or variant.divisible
        and signature[name] == "i32"
        and _is_size(name)
    }
    present = {name: value for name, value in constants.items() if name in names}
    source = ASTSource(variant.kernel, signature, present, attributes)
    gpu = GPUTarget(target.backend, target.arch, target.warp)
    compiled = triton.compile(source, target=gpu, options=options)
    measure = _measure_hip if target.backend == "hip" else _measure_cuda
    return {"shared": compiled.metadata.shared, **measure(compiled.asm)}


def _type_of(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return "*" + POINTERS.get(name, dtype)
    return "fp32" if name in FLOATS else "i32"


def _is_size(name: str) -> bool:
    return name in ("M", "N", "K", "N_out", "K_in") or name.startswith("stride")


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
        "loads16": len(re.findall(r"cp\.async\.cg\.shared\.global|ld\.global[\w.]*\.v4\.b32", ptx)),
        "loads2": len(re.findall(r"ld\.global\.b16", ptx)),
        "stores16": len(re.findall(r"st\.global[\w.]*\.v4\.b32", ptx)),
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
        "loads16": len(re.findall(r"(?:global|buffer)_load_dwordx4", code)),
        "loads2": len(re.findall(r"(?:global|buffer)_load_(?:ushort|short)", code)),
        "stores16": len(re.findall(r"(?:global|buffer)_store_dwordx4", code)),
        "wgmma": 0,
        "mma": len(re.findall(r"v_mfma", code)),
    }


def run(listed: list[Job], processes: int = 2) -> dict[str, dict[str, int]]:
    """Compile the jobs in parallel processes; return key → resources."""
    with ProcessPoolExecutor(processes) as pool:
        return dict(zip([job.key for job in listed], pool.map(compile_job, listed), strict=True))


def committed_rows() -> dict[str, dict[str, int]]:
    """Return the committed table's rows."""
    rows: dict[str, dict[str, int]] = json.loads(RESOURCES.read_text())["rows"]
    return rows


def main() -> int:
    """Compare with the committed table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace resources.json")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--target", action="append", choices=TARGETS)
    arguments = parser.parse_args()
    measured = run(jobs(arguments.target or TARGETS), arguments.processes)
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
