"""Which backend serves a call, in which order it was asked for, and what a refusal says."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from finegates import FusedGatedLinear, _env, _native
from finegates.diagnosis import diagnosis
from finegates.ops import (
    _triton,
    dispatch,
    gated_linear,
    gated_matmul,
    norm_gather,
    open_mass,
    pruned_linear,
    table,
    use_backend,
)
from finegates.ops.dispatch import Implementation, choose, requested_backend


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINEGATES_BACKEND", raising=False)
    monkeypatch.delenv("FINEGATES_LOG", raising=False)


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An op with a native backend that refuses 13 and a torch backend that takes all."""
    ran: list[str] = []

    def entry(backend: str, why_not: Any) -> Implementation:
        return Implementation(backend, why_not, lambda *_: ran.append(backend), lambda: None)

    row = (
        entry("native", lambda x: "13 is unlucky" if x == 13 else None),
        entry("torch", lambda x: None),
    )
    monkeypatch.setitem(dispatch.TABLE, "toy", row)
    return ran


def test_auto_takes_the_first_that_can(two_backends: list[str]) -> None:
    assert choose("toy", "auto", 1).backend == "native"
    assert choose("toy", "auto", 13).backend == "torch"


def test_named_backend_raises_with_its_reason(two_backends: list[str]) -> None:
    assert choose("toy", "native", 1).backend == "native"
    assert choose("toy", "torch", 1).backend == "torch"
    with pytest.raises(ValueError, match="backend='native' can't run toy: 13 is unlucky"):
        choose("toy", "native", 13)
    with pytest.raises(ValueError, match="backend='triton' has no implementation of toy"):
        choose("toy", "triton", 1)
    with pytest.raises(ValueError, match="backend must be one of .* got 'typo'"):
        choose("toy", "typo", 1)


def test_context_and_environment_speak_to_the_ops_that_have_the_backend(
    two_backends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with use_backend("triton"):
        assert choose("toy", "auto", 1).backend == "native"
    with use_backend("native"), pytest.raises(ValueError, match="13 is unlucky"):
        choose("toy", "auto", 13)
    monkeypatch.setenv("FINEGATES_BACKEND", "native")
    layer, x = FusedGatedLinear(3, 2), torch.ones(1, 3)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    with pytest.raises(ValueError, match="backend='native' has no implementation of gated_linear"):
        gated_linear(x, layer.weight, backend="native")


def test_layer_wins_over_context_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEGATES_BACKEND", "triton")
    assert requested_backend("auto") == "triton"
    with use_backend("native"):
        assert requested_backend("auto") == "native"
        assert requested_backend("torch") == "torch"
        with use_backend("auto"):
            assert requested_backend("auto") == "auto"
        assert requested_backend("auto") == "native"
    assert requested_backend("auto") == "triton"


def test_context_ends_with_an_error_and_stays_in_its_thread() -> None:
    seen: list[str] = []

    def ask_a_thread_and_fail() -> None:
        with use_backend("native"):
            thread = threading.Thread(target=lambda: seen.append(requested_backend("auto")))
            thread.start()
            thread.join()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        ask_a_thread_and_fail()
    assert seen == ["auto"]
    assert requested_backend("auto") == "auto"


DIFFERENTIABLE = ("gated_linear", "gated_matmul", "open_mass")


@pytest.mark.parametrize("op", DIFFERENTIABLE)
@pytest.mark.parametrize("asked", ["torch", "triton", "native"])
def test_backward_in_another_thread_takes_what_its_forward_asked_for(
    op: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As autograd's own thread does for GPU tensors; native has no part in this table: auto."""
    backward, ran = f"{op}_backward", []
    reference = dispatch.TABLE[backward][-1].run

    def entry(backend: str) -> Implementation:
        def run(*args: Any) -> Any:
            ran.append(backend)
            return reference(*args)

        return Implementation(backend, lambda *_: None, run, lambda: None)

    monkeypatch.setitem(dispatch.TABLE, op, dispatch.TABLE[op][-1:])
    monkeypatch.setitem(dispatch.TABLE, backward, (entry("triton"), entry("torch")))
    x, logits = torch.ones(1, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    constants = ("gaussian", (0.5, 0.1, 1.0))
    with use_backend(asked):
        if op == "gated_linear":
            y = gated_linear(x, torch.ones(2, 3))
        elif op == "gated_matmul":
            y = gated_matmul(x, torch.ones(2, 3), None, None, None, None, *constants)
        else:
            y = open_mass(logits, torch.tensor([0, 3]), "gaussian", 0.5)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert ran == ["torch" if asked == "torch" else "triton"]


@pytest.mark.parametrize("op", ["gated_linear", "gated_matmul", "pruned_linear", "norm_gather"])
def test_triton_refuses_tensors_of_the_cpu(op: str) -> None:
    """Before any launch: by name it is an error, otherwise another backend's call."""
    x, w, index = torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 2], dtype=torch.int32)
    run = {
        "gated_linear": lambda **way: gated_linear(x, w, **way),
        "gated_matmul": lambda **way: gated_matmul(
            x, w, None, None, None, None, "gaussian", (0.5, 0.1, 1.0), **way
        ),
        "pruned_linear": lambda **way: pruned_linear(x[:, :2], w[:, :2], None, None, None, **way),
        "norm_gather": lambda **way: norm_gather(x, index, **way),
    }[op]
    reason = "x is on cpu, the kernels run on a GPU"
    with pytest.raises(ValueError, match=f"backend='triton' can't run {op}: {reason}") as error:
        run(backend="triton")
    assert "\n" not in str(error.value)
    run()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, int]]]]:
    """Name and compute capability of each GPU there seems to be; tensors on them are fake."""
    pytest.importorskip("triton")
    there: list[tuple[str, tuple[int, int]]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(there))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: there[device.index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: there[device.index][1])
    for answer in (_triton.status, _triton.too_old):
        answer.cache_clear()
    with FakeTensorMode():
        yield there
    for answer in (_triton.status, _triton.too_old):
        answer.cache_clear()


T4, H100 = ("Tesla T4", (7, 5)), ("H100", (9, 0))
TOO_OLD = "Tesla T4 has compute capability 7.5, the kernels need 8.0"


def test_a_gpu_that_is_too_old_is_named_and_left_to_torch(
    gpus: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpus.append(T4)
    states = {reason for _, name, reason in table() if name.startswith("triton")}
    assert states == {TOO_OLD}
    caplog.set_level(logging.INFO, logger="finegates")
    monkeypatch.setenv("FINEGATES_LOG", "1")
    operands = (torch.empty(2, 4, device="cuda:0"), torch.empty(3, 4, device="cuda:0"))
    chosen = choose("gated_linear", "auto", *operands, None, None, None)
    assert chosen.backend == "torch"
    assert caplog.messages == [f"gated_linear: not triton, {TOO_OLD}", "gated_linear: torch"]
    with pytest.raises(ValueError, match=f"can't run gated_linear: {TOO_OLD}"):
        choose("gated_linear", "triton", *operands, None, None, None)
    assert TOO_OLD in diagnosis()


def test_beside_a_newer_gpu_only_the_old_one_is_refused(gpus: list[Any]) -> None:
    gpus[:] = [T4, H100]
    assert {reason for _, name, reason in table() if name.startswith("triton")} == {None}
    for index, backend in enumerate(("torch", "triton")):
        device = torch.device("cuda", index)
        operands = (torch.empty(2, 4, device=device), torch.empty(3, 4, device=device))
        assert choose("gated_linear", "auto", *operands, None, None, None).backend == backend


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match="backend must be one of .* got 'cuda'"),
        use_backend("cuda"),
    ):
        pass
    monkeypatch.setenv("FINEGATES_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FINEGATES_BACKEND must be one of .* got 'cuda'"):
        gated_linear(torch.ones(1, 2), torch.ones(3, 2))


def test_environment_reaches_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEGATES_BACKEND", "triton")
    x, w = torch.ones(1, 2), torch.ones(3, 2)
    with pytest.raises(ValueError, match="backend='triton' can't run gated_linear"):
        gated_linear(x, w)
    with pytest.raises(ValueError, match="backend='triton' can't run pruned_linear: x is on cpu"):
        pruned_linear(x, w)
    assert gated_linear(x, w, backend="torch").tolist() == [[2.0] * 3]


def test_log_names_choice_and_refusals(
    two_backends: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="finegates")
    choose("toy", "auto", 13)
    assert caplog.messages == []
    monkeypatch.setenv("FINEGATES_LOG", "1")
    _env.log_dispatch.cache_clear()
    choose("toy", "auto", 13)
    assert caplog.messages == ["toy: not native, 13 is unlucky", "toy: torch"]


def test_every_op_ends_with_torch_and_the_table_says_why_not() -> None:
    rows = table()
    for op, row in dispatch.TABLE.items():
        assert row[-1].backend == "torch"
        assert row[-1].status() == (_native.reason() if op.startswith("packed") else None)
        names = [name for o, name, _ in rows if o == op]
        assert names == [entry.name for entry in row]
        assert len(set(names)) == len(names), "rows that can't be told apart"
    for _, name, reason in rows:
        assert name.split(" (")[0] in _env.BACKENDS
        assert reason is None or (reason and "\n" not in reason)
