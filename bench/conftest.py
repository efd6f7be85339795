"""Options and the machine's description for every suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import harness
import pytest
import torch
from pytest_benchmark.utils import get_commit_info
from shapes import QUICK_BATCHES, QUICK_LAYERS, QUICK_REMOVED

from finegates import _native
from finegates.report import cpu_name


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("finegates")
    group.addoption(
        "--quick", action="store_true", help="an eighth of the cells, a minute on one thread"
    )
    group.addoption("--threads", default="1", help="thread counts, comma separated, or 'all'")
    group.addoption(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: time of the calling thread, for one thread on a busy machine",
    )


def thread_counts(config: pytest.Config) -> list[int]:
    text = config.getoption("--threads")
    every = torch.get_num_threads()
    return [every if part == "all" else int(part) for part in text.split(",")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "threads" in metafunc.fixturenames:
        counts = thread_counts(metafunc.config)
        metafunc.parametrize("threads", counts, ids=[f"T{count}" for count in counts])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``--quick`` keeps what a suite marks as quick (shapes.py decides)."""
    if not config.getoption("--quick"):
        return
    slow = [item for item in items if not getattr(item, "callspec", None) or not _quick(item)]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


def _quick(item: Any) -> bool:
    params = item.callspec.params
    kept = {"layer": QUICK_LAYERS, "m": QUICK_BATCHES, "removed": QUICK_REMOVED}
    return all(params.get(name, values[0]) in values for name, values in kept.items())


@pytest.fixture(autouse=True)
def _inference(request: pytest.FixtureRequest) -> Iterator[None]:
    if not _native.available():
        pytest.skip(str(_native.reason()))
    before = torch.get_num_threads()
    clock = request.config.getoption("--clock")
    if "threads" in request.fixturenames:
        threads = request.getfixturevalue("threads")
        if clock == "cpu" and threads > 1:
            pytest.fail("--clock cpu sees one thread only")
        torch.set_num_threads(threads)
    harness.clock = harness.CLOCKS[clock]
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["clock"] = config.getoption("--clock")
    machine_info["cpu_name"] = cpu_name()
    machine_info["isa"] = _native.isa()
    machine_info["tune"] = _native.tune()
    machine_info["torch"] = torch.__version__
    machine_info["last_level_cache"] = harness.last_level_cache()
    commit = get_commit_info()
    machine_info["commit"] = commit["id"] + (" and changes" if commit["dirty"] else "")
