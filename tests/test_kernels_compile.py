"""Every kernel compiles for every target without a GPU, within the device's means.

``kernels/resources.json`` holds what each kernel × dtype × row of the launch table needs; all of it
is compiled again here (eight minutes of one core, a test per target and kernel), as
``python -m finegates.kernels.compile`` does.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from finegates.kernels import compile as aot  # noqa: E402, needs triton
from finegates.kernels.launch import DTYPES, FAMILIES, GEMM, gemm_tile  # noqa: E402

ROWS = aot.committed_rows()
JOBS = {job.key: job for job in aot.jobs()}
COMPILED_TOGETHER = list(dict.fromkeys((job.target, job.variant) for job in JOBS.values()))


def is_gemm(key: str) -> bool:
    return re.match(r"gated_matmul_(fwd|bwd_x|bwd_w|bwd_r)", key) is not None


def may_gather(job: aot.Job) -> bool:
    """Whether a form has an index map, or sizes that rule 16-byte loads out."""
    variant = aot.VARIANTS[job.variant]
    maps = ("rows_ptr", "columns_ptr")
    return not variant.divisible or any(
        variant.constants.get(name, "") is not None for name in maps
    )


def test_every_kernel_and_dtype_is_compiled() -> None:
    """In one variant of each kernel at least; fp16 has few, see `aot.VARIANTS`."""
    forms = {(aot.VARIANTS[job.variant].kernel, job.target, job.dtype) for job in JOBS.values()}
    for kernel, targets in itertools.product({v.kernel for v in aot.VARIANTS}, aot.TARGETS):
        only = ("fp32",) if "open_mass" in kernel.fn.__name__ else aot.DTYPES
        assert all((kernel, targets, dtype) in forms for dtype in only), kernel


def test_no_kernel_adds_in_an_order_of_its_own() -> None:
    """Two runs give the same bits: sums are stored and added in order, never by atomics.

    The interpreter runs programs one after the other, so equal runs there prove nothing of it.
    """
    sources = Path(aot.__file__).parent.glob("*.py")
    assert [path.name for path in sources if "tl.atomic" in path.read_text()] == []


def test_the_committed_table_is_that_of_the_launch_table() -> None:
    assert list(ROWS) == list(JOBS)


def assert_within_the_devices_means(job: aot.Job, row: dict[str, int]) -> None:
    key = job.key
    assert row["spills"] == 0, key
    assert row["shared"] <= aot.TARGETS[job.target].shared, key
    assert row["registers"] <= (512 if job.target == "gfx942" else 255), key
    if is_gemm(key) or key.startswith("fold"):
        odd = not aot.VARIANTS[job.variant].divisible
        assert odd or row["loads16"] > 0, f"{key}: operands come in 16-byte loads"
    if is_gemm(key) and not may_gather(job):
        assert row["loads2"] <= 1, f"{key}: nothing but the bias comes by elements"
    if not is_gemm(key) or job.dtype == "fp32" and "[tf32]" not in key:
        return
    assert row["mma"] + row["wgmma"] > 0, f"{key}: no tensor-core instruction"
    output_rows = job.options["BLOCK_N" if "bwd_w" in key else "BLOCK_M"]
    if job.target == "sm_90" and output_rows >= 64:
        assert row["wgmma"] > 0, key


def test_committed_rows_are_within_the_devices_means() -> None:
    for key, row in ROWS.items():
        assert_within_the_devices_means(JOBS[key], row)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "variant"),
    COMPILED_TOGETHER,
    ids=[f"{target}-{aot.VARIANTS[variant].name}" for target, variant in COMPILED_TOGETHER],
)
def test_compiled_code_is_the_committed_one(
    target: str, variant: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every dtype and tile. With another Triton the numbers may move, the limits may not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    jobs = [job for job in JOBS.values() if (job.target, job.variant) == (target, variant)]
    same = json.loads(aot.RESOURCES.read_text())["triton"] == triton.__version__
    for job in jobs:
        row = aot.compile_job(job)
        assert_within_the_devices_means(job, row)
        assert row == ROWS[job.key] or not same, job.key


# Sizes and strides of 1 become constants, absent tensors None, gates may have the operands' dtype.
ONES = dict.fromkeys(("M", "N", "K", "N_out", "stride_xm", "stride_wn", "stride_ym"), 1)
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "one token": ("gated_matmul_fwd[pruned few]", {"M": 1}),
    "1 x 1 x 1": ("gated_matmul_fwd[gaussian]", {**ONES, "row_span": 1, "row_width": 1}),
    "1 x 1 x 1 backward": ("gated_matmul_bwd_x", {**ONES, "K_in": 1}),
    "1 x 1 x 1 to w": ("gated_matmul_bwd_w", {**ONES, "K_in": 1}),
    "sums only": ("gated_matmul_bwd_x", {"dx_ptr": None, "dc_ptr": None}),
    "dx only": ("gated_matmul_bwd_x", {"dc_ptr": None, "dr_ptr": None, "db_ptr": None}),
    "dw only": ("gated_matmul_bwd_w", {"dc_ptr": None, "dr_ptr": None, "db_ptr": None}),
    "given values": (
        "gated_matmul_bwd_gates[value]",
        {"row_logits_ptr": None, "column_logits_ptr": None},
    ),
    "compact": (
        "gated_matmul_bwd_gates[ranking]",
        {"r_ptr": None, "c_ptr": None},
    ),
}


@pytest.mark.parametrize("gates", ["fp32", "bf16"])
@pytest.mark.parametrize("form", list(FORMS))
def test_other_forms_compile(
    form: str, gates: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forms that the launchers use beside the table's; inner strides that are not 1 with bf16."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, changes = FORMS[form]
    index = [variant.name for variant in aot.VARIANTS].index(name)
    constants = {**aot.VARIANTS[index].constants, **changes}
    if gates == "bf16":
        for stride in ("stride_xk", "stride_wk", "stride_dyn"):
            constants.pop(stride, None)
        pointers = dict.fromkeys(("r_ptr", "c_ptr"), "bf16")
        monkeypatch.setattr(aot, "POINTERS", {**aot.POINTERS, **pointers})
    variants = list(aot.VARIANTS)
    variants[index] = variants[index]._replace(constants=constants)
    monkeypatch.setattr(aot, "VARIANTS", tuple(variants))
    jobs = [job for job in JOBS.values() if job.variant == index and job.target == "sm_90"]
    job = [job for job in jobs if job.dtype == "bf16"][-1]
    assert aot.compile_job(job)["spills"] == 0


def test_every_family_has_a_tile_for_every_kernel_and_dtype() -> None:
    for (kernel, bits), families in GEMM.items():
        assert set(families) == set(FAMILIES), (kernel, bits)
        for tiles in families.values():
            for tile in tiles:
                for size in (tile.m, tile.n, tile.k):
                    assert size >= 16
                    assert size & (size - 1) == 0
    assert {bits for _, bits in GEMM} == {dtype.itemsize * 8 for dtype in DTYPES}


def test_the_tile_fits_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows take a low tile; a grid that can't fill the device takes the smallest."""
    monkeypatch.setattr("finegates.kernels.launch.family", lambda device: "hopper")
    monkeypatch.setattr("finegates.kernels.launch.processors", lambda device: 132)
    x = torch.empty(0, dtype=torch.bfloat16)
    tiles = {m: gemm_tile("fwd", x, m, 4096, 4096) for m in (1, 32, 16384)}
    assert tiles[1].m == 16
    assert tiles[16384][:3] == (128, 256, 64)
    for kernel in ("fwd", "bwd_x", "bwd_w", "fwd_map", "bwd_x_map"):
        for m in (0, 1, 7, 100, 4096):
            tile = gemm_tile(kernel, x, m, 768, 768)
            assert tile in GEMM[kernel, 16]["hopper"]
