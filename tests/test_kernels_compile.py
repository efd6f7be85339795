"""Every kernel compiles for every target without a GPU, within the device's means.

``kernels/resources.json`` holds what each kernel × dtype × row of the launch table needs; all of it
is compiled again here (minutes of all cores: docs/kernels.md; a test per target and kernel), as
``python -m finegates.kernels.compile`` does.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from ahead import asked_for

triton = pytest.importorskip("triton")

from finegates.kernels import compile as aot  # noqa: E402, needs triton
from finegates.kernels.launch import DTYPES, FAMILIES, GEMM, gemm_tile  # noqa: E402

ROWS = aot.committed_rows()
JOBS = {job.key: job for job in aot.jobs()}
COMPILED_TOGETHER = list(dict.fromkeys((job.target, job.variant) for job in JOBS.values()))


GEMMS = re.compile(r"gated_matmul_(fwd|bwd_[xwr])\b")
MATRICES = {"x", "w", "dy", "y", "dx", "residual"}


def by_element(variant: aot.Variant) -> set[str]:
    """The matrices whose features are addressed one by one, through an index map."""
    rows, columns = (f"{side}_ptr" in variant.operands("bf16") for side in ("rows", "columns"))
    in_loads = not variant.constants.get("GATHERED", True)
    kernel = variant.kernel.fn.__name__
    if kernel == "_gated_matmul_fwd_kernel":
        found = {"residual": rows, "x": columns and in_loads}
    elif kernel == "_gated_matmul_bwd_x_kernel":
        found = {"y": rows, "dy": rows and in_loads, "x": columns}
    elif kernel == "_gated_matmul_bwd_r_kernel":
        found = {"dy": rows, "x": columns and in_loads}
    else:
        found = {}
    return {name for name, mapped in found.items() if mapped}


def test_every_row_of_the_launch_table_is_compiled_for_every_kernel_and_dtype() -> None:
    """All tiles of a row, in one variant of each kernel at least; fp16 has few, see `VARIANTS`."""
    compiled = set()
    for job in JOBS.values():
        variant = aot.VARIANTS[job.variant]
        if not variant.few:
            table = variant.table if isinstance(variant.table, str) else ""
            compiled.add((variant.kernel, table, job.target, job.dtype))
    assert {variant.row for variant in aot.VARIANTS} - {None} == {row for row, _ in GEMM}
    for kernel, table in {(kernel, table) for kernel, table, *_ in compiled}:
        only = ("fp32",) if "open_mass" in kernel.fn.__name__ else aot.DTYPES
        for target, dtype in itertools.product(aot.TARGETS, only):
            assert (kernel, table, target, dtype) in compiled


def test_no_kernel_adds_in_an_order_of_its_own() -> None:
    """Two runs give the same bits: sums are stored and added in order, never by atomics.

    The interpreter runs programs one after the other, so equal runs there prove nothing of it.
    """
    sources = Path(aot.__file__).parent.glob("*.py")
    assert [path.name for path in sources if "tl.atomic" in path.read_text()] == []


def test_the_committed_table_is_that_of_the_launch_table() -> None:
    assert list(ROWS) == list(JOBS)


def assert_within_the_devices_means(job: aot.Job, row: aot.Resources) -> None:
    key = job.key
    assert row["spills"] == 0, key
    assert row["shared"] <= aot.TARGETS[job.target].shared, key
    assert row["registers"] <= (512 if job.target == "gfx942" else 255), key
    assert_wide_loads(job, row)
    if not GEMMS.match(key) or job.dtype == "fp32" and "[tf32]" not in key:
        return
    assert row["mma"] + row["wgmma"] > 0, f"{key}: no tensor-core instruction"
    output_rows = job.options["BLOCK_N" if "bwd_w" in key else "BLOCK_M"]
    if job.target == "sm_90" and output_rows >= 64:
        assert row["wgmma"] > 0, key


def assert_wide_loads(job: aot.Job, row: aot.Resources) -> None:
    """Every load of every matrix is of 16 bytes, but through an index map and of what is odd."""
    variant = aot.VARIANTS[job.variant]
    if variant.odd or not (GEMMS.match(job.key) or job.key.startswith("fold")):
        return
    assert "unknown" not in row["loads"], job.key
    wide = MATRICES - by_element(variant)
    loaded = {name: widths for name, widths in row["loads"].items() if name in wide}
    assert "w" in loaded or "dx" in loaded, job.key
    assert {width for widths in loaded.values() for width in widths} == {"16"}, job.key


@pytest.mark.parametrize("dtype", aot.DTYPES)
@pytest.mark.parametrize("operand", ["x", "w"])
def test_a_narrow_load_of_one_operand_is_seen(operand: str, dtype: str) -> None:
    found = [job for job in JOBS.values() if (job.variant, job.dtype) == (0, dtype)]
    for job in found:
        row = ROWS[job.key]
        assert_wide_loads(job, row)
        narrow = {**row["loads"][operand], "4": 1}
        with pytest.raises(AssertionError, match="gaussian"):
            assert_wide_loads(job, {**row, "loads": {**row["loads"], operand: narrow}})


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("operand", ["x", "w"])
def test_loads_are_told_apart_by_operand(
    operand: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of any length of one matrix narrow its own loads, and nobody else's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    stride = {"x": "stride_xm", "w": "stride_wn"}[operand]
    known = aot.Variant.multiples.fget
    monkeypatch.setattr(aot.Variant, "multiples", property(lambda self: known(self) - {stride}))
    found = [job for job in JOBS.values() if (job.variant, job.target) == (0, target)]
    loads = aot.compile_job(next(job for job in found if job.dtype == "bf16"))["loads"]
    assert set(loads[operand]) == {"2"}
    assert set(loads[{"x": "w", "w": "x"}[operand]]) == {"16"}


def test_any_tile_of_a_variant_can_be_tried() -> None:
    tile = GEMM["fwd", 16]["hopper"][0]
    (job,) = aot.trials("gated_matmul_fwd[ranking]", tile, ["sm_90"])
    assert job == JOBS[job.key]
    (other,) = aot.trials("gated_matmul_fwd[ranking]", tile._replace(stages=7), ["sm_90"])
    assert other.key not in JOBS
    with pytest.raises(ValueError, match="fold_bwd takes no tile"):
        aot.trials("fold_bwd", tile)


def test_committed_rows_are_within_the_devices_means() -> None:
    for key, row in ROWS.items():
        assert_within_the_devices_means(JOBS[key], row)


@pytest.fixture(scope="module")
def compiling(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[aot.Resources]]]:
    """Key → resources of what the chosen tests ask for, compiled ahead of them on all cores."""
    together = {(params["target"], params["variant"]) for params in asked_for(request)}
    listed = [job for job in JOBS.values() if (job.target, job.variant) in together]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with aot.compiling(listed) as futures:
            yield futures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "variant"),
    COMPILED_TOGETHER,
    ids=[f"{target}-{aot.VARIANTS[variant].name}" for target, variant in COMPILED_TOGETHER],
)
def test_compiled_code_is_the_committed_one(
    target: str, variant: int, compiling: dict[str, Future[aot.Resources]]
) -> None:
    """Every dtype and tile. With another Triton the numbers may move, the limits may not."""
    jobs = [job for job in JOBS.values() if (job.target, job.variant) == (target, variant)]
    same = json.loads(aot.RESOURCES.read_text())["triton"] == triton.__version__
    for job in jobs:
        row = compiling[job.key].result()
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
    """Forms that the launchers use beside the table's, and gates in the operands' dtype."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, changes = FORMS[form]
    index = [variant.name for variant in aot.VARIANTS].index(name)
    changed = aot.VARIANTS[index]._replace(
        constants={**aot.VARIANTS[index].constants, **changes}, half=gates == "bf16"
    )
    variants = list(aot.VARIANTS)
    variants[index] = changed
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
    # 128 tiles of 128 × 128 keep 132 multiprocessors busy enough, 96 don't.
    assert gemm_tile("fwd", x, 1024, 2048, 8192)[:2] == (128, 128)
    assert gemm_tile("fwd", x, 1024, 1536, 8192)[:2] == (64, 64)
    for kernel in ("fwd", "bwd_x", "bwd_w", "fwd_map", "bwd_x_map"):
        for m in (0, 1, 7, 100, 4096):
            tile = gemm_tile(kernel, x, m, 768, 768)
            assert tile in GEMM[kernel, 16]["hopper"]
