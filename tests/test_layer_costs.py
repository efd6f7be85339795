"""Measuring costs: a counting clock, noise that must go, state that must stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finegates import GateConfig, PrunedLinear
from finegates.cost_table import CostTable
from finegates.report import layer_costs, measure_costs, write_costs
from tiny_models import build

ALL = GateConfig(modules=("*",))


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let a run of a layer take the number of its multiplications, times a factor by cell."""
    told: dict[str, Any] = {"noise": lambda cell: 1.0, "cell": 0}
    seen: list[float] = []
    forward = PrunedLinear.forward

    def counting(self: PrunedLinear, x: torch.Tensor) -> torch.Tensor:
        seen.append(float(x.shape[0] * self.weight.numel()))
        return forward(self, x)

    def interleave(calls: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, list[float]]:
        times = {}
        for name, call in calls.items():
            call()
            told["cell"] += 1
            times[name] = [seen[-1] * told["noise"](told["cell"])]
        return times

    monkeypatch.setattr(PrunedLinear, "forward", counting)
    monkeypatch.setattr(layer_costs, "interleave", interleave)
    return told


def test_every_shape_is_measured_once(work: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False))
    table = measure_costs(model, ALL, tokens=5)
    assert [costs.shape for costs in table.linears] == [(16, 24), (16, 16)]
    assert (table.tokens, table.threads) == (5, torch.get_num_threads())
    assert table.linears[0].rows == (1, 3, 5, 7, 9, 11, 13, 16)
    for rows, columns in ((16, 24), (6, 9), (8, 12)):
        assert table.seconds((16, 24), rows, columns) == pytest.approx(5 * rows * columns)


def test_noise_never_makes_less_dearer(work: dict[str, Any]) -> None:
    work["noise"] = lambda cell: 3.0 if cell % 7 == 0 else 1.0
    (costs,) = measure_costs(nn.Sequential(nn.Linear(24, 16)), ALL).linears
    by_rows = torch.tensor(costs.seconds)
    assert (by_rows.diff(dim=0) >= 0).all()
    assert (by_rows.diff(dim=1) >= 0).all()


def test_measuring_leaves_the_model_the_noise_and_the_threads_alone() -> None:
    model, threads = build("bert"), torch.get_num_threads()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    noise = torch.get_rng_state()
    table = measure_costs(model, GateConfig(), tokens=3, threads=1, seconds=1e-4)
    assert table.threads == 1
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert {costs.shape for costs in table.linears} == {(24, 24), (20, 24), (24, 20)}


def test_file_is_the_table(tmp_path: Path, work: dict[str, Any]) -> None:
    table = measure_costs(nn.Sequential(nn.Linear(24, 16)), ALL)
    write_costs(tmp_path / "costs.json", table)
    assert CostTable.from_dict(json.loads((tmp_path / "costs.json").read_text())) == table


@pytest.mark.parametrize("name", ["tokens", "threads"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        measure_costs(nn.Sequential(nn.Linear(4, 4)), ALL, **{name: 0})
