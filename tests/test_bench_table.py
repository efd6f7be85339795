"""bench/table.py: what falls short of a bar is said, and never rounds to the bar."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[1] / "bench" / "table.py"


MACHINE = {"cpu_name": "cpu", "isa": "avx2", "torch": "2", "clock": "wall", "commit": "abc"}


def write(path: Path, machine: dict[str, str], *rows: dict[str, Any]) -> str:
    cells = [{"group": row.pop("group"), "extra_info": row} for row in rows]
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": cells}))
    return str(path)


def report(tmp_path: Path, *rows: dict[str, Any]) -> str:
    """The lines of the report on what falls short."""
    path = write(tmp_path / "bench.json", MACHINE, *rows)
    out = subprocess.check_output([sys.executable, str(TABLE), path], text=True)
    assert ", commit abc, " in out.splitlines()[0]
    return out.split("**short of a bar**\n\n")[1].split("\n\n")[0]


def grid(m: int, dense: float, library: float = 1.5, peak: float = 0.9) -> dict[str, Any]:
    return {
        "group": "grid",
        "layer": "768x768",
        "dtype": "bf16",
        "m": m,
        "threads": 1,
        "dense_ratio": dense,
        "fastest_dense_ratio": dense,
        "library_ratio": library,
        "share_of_peak": peak,
    }


def other(group: str, **values: Any) -> dict[str, Any]:
    return {"group": group, "layer": "64x64", "dtype": "fp32", "m": 1, "threads": 1, **values}


def cold(share: float, **values: Any) -> dict[str, Any]:
    cell = {"removed": 0.4, "dense_ratio": 1.0, "share_of_read_bandwidth": share}
    return other("cold", **{**cell, **values})


def test_all_bars_met(tmp_path: Path) -> None:
    rows = [grid(1, 3.0), grid(8, 2.5), grid(512, 5 / 3 + 1e-9, 1.0, 0.88)]
    rows += [other("overhead", overhead_ratio=1.3, module_ratio=1.3, packed_linear_ratio=1.3)]
    rows += [cold(0.85), other("pack", memory_over_weight=1.05)]
    rows += [{**grid(1, 3.0), "share_of_read_bandwidth": 0.85}]
    assert report(tmp_path, *rows) == "none"


def test_each_miss_is_named_and_rounds_away_from_its_bar(tmp_path: Path) -> None:
    rows = [grid(64, 1.66666, 0.9999, 0.8799)]
    rows += [other("overhead", overhead_ratio=1.2, module_ratio=1.3001)]
    rows += [cold(0.84999), cold(1.0001, layer="big")]
    rows += [cold(0.5, m=512, dense_ratio=0.9999, removed=0.05)]
    rows += [{**grid(1, 3.0, 1.0), "share_of_read_bandwidth": 0.84999}, grid(128, 1.7, 1.0)]
    rows += [other("compiled", compiled_ratio=0.9999)]
    rows += [
        other("pack", memory_over_weight=1.0501),
        other("removed", dense_ratio=0.9999, removed=0.05),
    ]
    rows += [other("int8", ratio=1.59999, share_of_read_bandwidth=0.5)]
    assert report(tmp_path, *rows).splitlines() == [
        (
            "* grid: 768x768 bf16 M=64 T=1: 1.666 times dense F.linear, not 1.667; "
            "0.999 times the best library GEMM, not 1.000; 0.879 of the arithmetic peak, not 0.880"
        ),
        "* overhead: 64x64 fp32 M=1 T=1: 1.301 of nn.Linear's call, PrunedLinear, more than 1.300",
        "* cold: 64x64 fp32 M=1 T=1 40% removed: 0.849 of bandwidth, not 0.850",
        "* cold: big fp32 M=1 T=1 40% removed: 1.001 of bandwidth, more than 1.000",
        "* cold: 64x64 fp32 M=512 T=1 5% removed: 0.999 times dense F.linear, not 1.000",
        "* grid: 768x768 bf16 M=1 T=1: 0.849 of bandwidth, not 0.850",
        "* compiled: 64x64 fp32 M=1 T=1: 0.999 times torch.compile, gathered shape, not 1.000",
        "* pack: 64x64 fp32 M=1 T=1: 1.051 of the weight's memory, more than 1.050",
        "* removed: 64x64 fp32 M=1 T=1 5% removed: 0.999 times dense F.linear, not 1.000",
        "* int8: 64x64 fp32 M=1 T=1: 1.599 times our bf16, not 1.600",
        "* geometric mean T=1: 2.040 dense_ratio, not 2.200",
        "* geometric mean T=1: 0.999 library_ratio, not 1.150",
    ]


def test_a_level_without_a_measured_peak_has_no_shares(tmp_path: Path) -> None:
    row = grid(64, 1.7)
    del row["share_of_peak"]
    assert report(tmp_path, row) == "* geometric mean T=1: 1.700 dense_ratio, not 2.200"


def test_files_of_two_machines_make_no_table(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{commit}.json", {**MACHINE, "commit": commit}, grid(1, 3.0))
        for commit in ("abc", "abd")
    ]
    command = [sys.executable, str(TABLE), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the files differ in commit: abc, abd" in done.stderr


def test_the_readmes_table_is_the_measured_one() -> None:
    root = TABLE.parents[1]
    section = (root / "README.md").read_text().split("## The CPU kernels")[1].split("\n## ")[0]
    path = re.search(r"\((bench/results/layers/\w+/one-thread)\.png\)", section)
    assert path is not None
    measured = (root / f"{path[1]}.md").read_text().split("**times faster than dense F.linear")[1]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 7 * 2
    assert [row for row in rows if row not in measured.split("**")[1]] == []
    least, mean = re.findall(r"Least (\d\.\d+), geometric mean (\d\.\d+)", section)[0]
    assert f"least {least}, geometric mean {mean}" in measured.split("**")[1]
