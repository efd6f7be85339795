"""Options and the machine's description for every suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import harness
import pytest
import torch

from finegates import _native
from finegates.report import cpu_name


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("finegates")
    group.addoption("--quick", action="store_true", help="a tenth of the grid, two minutes")
    group.addoption("--threads", default="1", help="thread counts, comma separated, or 'all'")
    group.addoption(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: time of the calling thread, for one thread on a busy machine",
    )
    group.addoption("--compiled", action="store_true", help="torch.compile with freezing as well")


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
    from shapes import QUICK_BATCHES, QUICK_LAYERS

    params = item.callspec.params
    return (
        params.get("layer", QUICK_LAYERS[0]) in QUICK_LAYERS
        and params.get("m", QUICK_BATCHES[0]) in QUICK_BATCHES
    )


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
    machine_info["torch"] = torch.__version__
