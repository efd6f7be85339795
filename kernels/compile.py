"""Compile the whole launch table ahead of time, without a GPU, and record what it needs.

``python -m finegates.kernels.compile`` prints the rows that differ from ``resources.json``;
``--write`` replaces the file. Registers, stack (spills), shared memory, 16-byte global loads and
tensor-core instructions come from the compiled code of each target.
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
from .launch import GEMM, OPTIONS, REDUCE, ROW_WISE, STREAM, gemm_options

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
    """One specialisation: its row of the launch table or its launch, its constants."""

    name: str
    kernel: Any
    table: str | dict[str, Any]
    constants: dict[str, Any]


_SAMPLED = {"residual_ptr": None, "ACTIVATION": "none", "GATHERED": False, **_DENSE, **_INNER}
_OPEN = {"ROW": "none", "COLUMN": "none", "r_ptr": None, "c_ptr": None}
_FROZEN = {"CLOSED_GRAD": False, **_INNER}
_REDUCED = {"NOISE": True, "CLOSED_GRAD": False, "CLOSED_ROW_GRAD": False, "DIVIDE_ROW": True,
            "rows_ptr": None}  # fmt: skip


def _both(distribution: str) -> dict[str, Any]:
    return {"ROW": distribution, "COLUMN": distribution}


VARIANTS = (
    Variant("gated_matmul_fwd[gaussian]", gated_matmul._gated_matmul_fwd_kernel, "fwd",
            {**_both("gaussian"), **_SAMPLED}),
    Variant("gated_matmul_fwd[hard_concrete]", gated_matmul._gated_matmul_fwd_kernel, "fwd",
            {**_both("hard_concrete"), **_SAMPLED}),
    Variant("gated_matmul_fwd[ranking]", gated_matmul._gated_matmul_fwd_kernel, "fwd",
            {**_both("ranking"), "seed_ptr": None, **_SAMPLED}),
    Variant("gated_matmul_fwd[value]", gated_matmul._gated_matmul_fwd_kernel, "fwd",
            {**_both("value"), **_GATES, **_SAMPLED}),
    Variant("gated_matmul_fwd[pruned]", gated_matmul._gated_matmul_fwd_kernel, "fwd_map",
            {"ACTIVATION": "gelu", "GATHERED": False, **_OPEN, **_GATES, **_INNER}),
    Variant("gated_matmul_fwd[scatter]", gated_matmul._gated_matmul_fwd_kernel, "fwd_map",
            {"ACTIVATION": "gelu", "GATHERED": True, **_OPEN, **_GATES, **_INNER}),
    Variant("gated_matmul_bwd_x", bwd._gated_matmul_bwd_x_kernel, "bwd_x",
            {"GATHERED": False, **_FROZEN, **_DENSE}),
    Variant("gated_matmul_bwd_x[compact]", bwd._gated_matmul_bwd_x_kernel, "bwd_x_map",
            {"GATHERED": True, "r_ptr": None, "c_ptr": None, **_FROZEN}),
    Variant("gated_matmul_fwd[tf32]", gated_matmul._gated_matmul_fwd_kernel, "fwd",
            {"PRECISION": "tf32", **_both("gaussian"), **_SAMPLED}),
    Variant("gated_matmul_bwd_x[tf32]", bwd._gated_matmul_bwd_x_kernel, "bwd_x",
            {"PRECISION": "tf32", "GATHERED": False, **_FROZEN, **_DENSE}),
    Variant("gated_matmul_bwd_w[tf32]", bwd._gated_matmul_bwd_w_kernel, "bwd_w",
            {"PRECISION": "tf32", **_FROZEN, **_DENSE}),
    Variant("gated_matmul_bwd_r", bwd._gated_matmul_bwd_r_kernel, "bwd_r",
            {"GATHERED": False, **_DENSE, **_INNER}),
    Variant("gated_matmul_bwd_w", bwd._gated_matmul_bwd_w_kernel, "bwd_w",
            {**_FROZEN, **_DENSE}),
    Variant("gated_matmul_bwd_gates[fused]", bwd._gated_matmul_bwd_gates_kernel, REDUCE,
            {"DISTRIBUTION": "gaussian", "DIVIDE_COLUMN": False, **_REDUCED}),
    Variant("gated_matmul_bwd_gates[fold]", bwd._gated_matmul_bwd_gates_kernel, REDUCE,
            {"DISTRIBUTION": "hard_concrete", "DIVIDE_COLUMN": True, **_REDUCED}),
    Variant("fold_fwd[gaussian]", fold._fold_fwd_kernel, STREAM, {**_both("gaussian"), **_INNER}),
    Variant("fold_fwd[hard_concrete]", fold._fold_fwd_kernel, STREAM,
            {**_both("hard_concrete"), **_INNER}),
    Variant("fold_bwd", fold._fold_bwd_kernel, STREAM, _INNER),
    Variant("norm_gather_fwd[rms]", norm_gather._norm_gather_fwd_kernel, ROW_WISE,
            {"NORM": "rms", "bias_ptr": None, **_INNER}),
    Variant("norm_gather_fwd[layer]", norm_gather._norm_gather_fwd_kernel, ROW_WISE,
            {"NORM": "layer", **_INNER}),
    Variant("open_mass_fwd", open_mass._open_mass_fwd_kernel, ROW_WISE,
            {"DISTRIBUTION": "gaussian"}),
    Variant("open_mass_bwd", open_mass._open_mass_bwd_kernel, ROW_WISE,
            {"DISTRIBUTION": "gaussian"}),
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
            for dtype, bits in DTYPES.items():
                if "[tf32]" in variant.name and (dtype != "fp32" or target == "gfx942"):
                    continue  # the CDNA table has no tf32
                if not isinstance(variant.table, str):
                    listed.append(Job(index, target, dtype, {**variant.table, **OPTIONS}))
                    continue
                table = variant.table.replace("bwd_r", "bwd_x")
                for tile in GEMM[table, bits][TARGETS[target].family]:
                    if variant.table == "bwd_r":
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
    # Sizes and strides that are multiples of 16, as the models' are, and aligned pointers.
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if signature[name].startswith("*") or signature[name] == "i32" and _is_size(name)
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
