"""What the GPU's training benchmark times is right, and what is wrong is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import bench_gated_linear
import gpu_layers
import pytest
import torch

from finegates import GateConfig
from finegates.ops import dispatch
from gated_case import NAMES


def providers(distribution: str) -> dict[str, gpu_layers.Provider]:
    config = GateConfig(distribution=distribution)
    layer = gpu_layers.make((66, 70, True), 33, torch.float16, config, "cpu")
    return gpu_layers.providers(layer, "eager")


@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
def test_every_provider_is_right(distribution: str) -> None:
    ways = providers(distribution)
    assert bench_gated_linear.correct(ways, print) == ways
    for name, kept in (("ordered-0%", 1.0), ("ordered-30%", 0.49), ("ordered-90%", 0.01)):
        assert ways[f"finegates-{name}"].layer.kept == pytest.approx(kept, abs=0.02), name
    assert ways["finegates-compact-40%"].layer.kept == pytest.approx(0.6, abs=0.02)
    assert "w" in ways["finegates-trained"].layer.trained
    assert "w" not in ways["finegates"].layer.trained


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_gradient_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth too large is refused, of every gradient and of every provider that has it."""
    choose = dispatch.choose

    def spoiled(op: str, *args: Any) -> dispatch.Implementation:
        entry = choose(op, *args)
        if op != "gated_matmul_backward":
            return entry

        def run(*operands: Any) -> tuple[torch.Tensor, ...]:
            grads = zip(NAMES, entry.run(*operands), strict=True)
            return tuple(1.1 * grad if of == name else grad for of, grad in grads)

        return dataclasses.replace(entry, run=run)

    monkeypatch.setattr(dispatch, "choose", spoiled)
    ways = providers("gaussian")
    refused = set(ways) - set(bench_gated_linear.correct(ways, print))
    ours = {way for way in ways if way.startswith("finegates")}
    assert refused == {way for way in ours if name in ways[way].layer.trained}


@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_second_compilation_is_an_error() -> None:
    """No recompile limit can send the compiled baseline back to eager unseen."""
    layers = [
        gpu_layers.make((6, 7, True), m, torch.float32, GateConfig(distribution="gaussian"), "cpu")
        for m in (3, 5)
    ]
    for layer in layers:
        forward = gpu_layers.compiled(layer, "eager")
        assert forward().shape == (layer.x.shape[0], 6)
    _, *others = forward.args
    with pytest.raises(torch._dynamo.exc.RecompileError):
        forward.func(layers[0].x, *others)
