"""Fixtures for every test: a fixed seed, poisoned uninitialised memory, thread counts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
import torch.utils._device
from torch import Tensor

from finegates import _env, _native

# torch.device(...) as a context knows constructors by identity, from a list made on first use: it
# must be made before the constructors below are replaced.
torch.utils._device._device_constructors()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--need-sanitizer",
        action="store_true",
        help="fail where compute-sanitizer is missing, instead of skipping",
    )


def pytest_configure(config: pytest.Config) -> None:
    expected = os.environ.get("EXPECTED_ISA", _native.isa())
    if _native.isa() != expected:
        raise pytest.UsageError(f"EXPECTED_ISA is {expected}, in use is {_native.isa()}")


class _TorchRandom:
    """torch's generator as hypothesis wants it: seeded before every example."""

    @staticmethod
    def seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def getstate() -> Tensor:
        return torch.random.get_rng_state()

    @staticmethod
    def setstate(state: Tensor) -> None:
        torch.random.set_rng_state(state)


hypothesis.register_random(_TorchRandom)
# The same examples on every run: a red test is never a matter of luck.
hypothesis.settings.register_profile("finegates", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("finegates")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_environment() -> Iterator[None]:
    """Let each test set the variables that are otherwise read once."""
    readers = (_env.backend, _env.log_dispatch)
    for reader in readers:
        reader.cache_clear()
    yield
    for reader in readers:
        reader.cache_clear()


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Fill what ``allocate`` returns: NaN, or the largest integer, which is no valid index."""

    @functools.wraps(allocate)
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        memory = allocate(*args, **kwargs)
        # Fake tensors hold no memory; torch.compile traces the allocation itself.
        if type(memory) is Tensor and memory.device.type != "meta":
            dtype = memory.dtype
            with torch.no_grad():
                if dtype.is_floating_point:
                    memory.fill_(float("nan"))
                elif dtype != torch.bool and not dtype.is_complex:
                    memory.fill_(torch.iinfo(dtype).max)
        return memory

    return poisoned


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make reading memory that nobody wrote visible (as flash-linear-attention's tests do)."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run the test with one and with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
