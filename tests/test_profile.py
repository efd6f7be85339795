"""`finegates profile`: rules over numbers, a clock that adds up, and the tables."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from finegates import _native, cli, optimize_for_cpu
from finegates.ops import _cpu
from finegates.report import profile as profiling
from finegates.report.module_clock import ModuleClock, hook_cost, part_of
from finegates.report.profile import LayerProfile, ModelProfile, profile_model
from finegates.report.profile_table import layer_lines, loss_text, part_lines, plot_profile
from finegates.report.timing import commit
from finegates.report.why import ALIGNED, EXPLAINED, losses, why_not_faster
from finegates.report.work import Work
from finegates.serving import PackedLinear
from finegates.serving.bert import FusedEncoderLayer
from serving_case import pruned
from tiny_models import build

needs_native = pytest.mark.skipif(
    _native.isa() in ("none", "generic"), reason="no native level with a measured peak"
)


@pytest.mark.parametrize("floor", ["overhead", "bandwidth", "compute"])
def test_the_largest_floor_that_explains_the_time_is_the_reason(floor: str) -> None:
    floors = {"overhead": 0.1, "bandwidth": 0.1, "compute": 0.1, floor: EXPLAINED}
    assert why_not_faster(1.0, floors, aligned=0.1) == f"{floor}-bound"


def test_reasons_of_what_no_floor_explains() -> None:
    floors = {"overhead": 0.1, "bandwidth": 0.3, "compute": 0.2}
    assert why_not_faster(1.0, floors, aligned=ALIGNED) == "misaligned"
    assert why_not_faster(1.0, floors, aligned=ALIGNED + 0.01) == "bandwidth-bound"
    assert why_not_faster(1.0, floors) == "bandwidth-bound"


def test_losses_are_sorted_and_named() -> None:
    parts = {"linear": 9.0, "attention": 2.0, "norm": 1.0, "embedding": 0.5, "rest": 3.0}
    assert list(losses(parts, {"misaligned": 2.5, "attention": 0.2}).items()) == [
        ("python/rest", 3.0), ("misaligned", 2.5), ("attention", 2.2), ("norm", 1.0),
        ("embedding", 0.5),
    ]  # fmt: skip


class Clock:
    """Stands still unless somebody moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Sleeper(nn.Module):
    """Takes a given time besides its children; the name is looked for by `part_of`."""

    def __init__(self, clock: Clock, seconds: float, *children: nn.Module) -> None:
        super().__init__()
        self.clock, self.seconds, self.inner = clock, seconds, nn.ModuleList(children)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.now += self.seconds
        for module in self.inner:
            x = module(x)
        return x


class SleeperAttention(Sleeper):
    pass


class SleeperNorm(Sleeper):
    pass


def test_clock_tells_own_time_from_that_of_children() -> None:
    moving = Clock()
    norms = [SleeperNorm(moving, 0.002), SleeperNorm(moving, 0.001)]
    model = Sleeper(moving, 0.004, SleeperAttention(moving, 0.003, *norms), nn.Linear(4, 4))
    clock = ModuleClock(model, [""], moving)
    x = torch.ones(2, 3, 4)
    for _ in range(5):
        assert clock.run(lambda: model(x)).shape == x.shape
    own, whole = clock.exclusive(), clock.inclusive()
    assert clock.parts == {
        "": "rest", "inner.0": "attention", "inner.0.inner.0": "norm", "inner.0.inner.1": "norm",
        "inner.1": "linear",
    }  # fmt: skip
    assert own == pytest.approx(
        {"": 0.004, "inner.0": 0.003, "inner.0.inner.0": 0.002, "inner.0.inner.1": 0.001,
         "inner.1": 0.0}
    )  # fmt: skip
    assert whole["inner.0"] == pytest.approx(0.006)
    assert whole[""] == pytest.approx(0.01)
    assert sum(own.values()) == pytest.approx(0.01)
    assert clock.rows == {"inner.1": 6}
    assert not model._forward_hooks
    inner, outer = hook_cost(time.thread_time)
    assert 0 <= outer < 1e-4
    assert 0 < inner < 1e-4


def test_parts_of_transformers() -> None:
    found = {type(m).__name__: part_of(m) for m in build("llama").modules()}
    assert found["LlamaRMSNorm"] == "norm"
    assert found["LlamaAttention"] == found["LlamaRotaryEmbedding"] == "attention"
    assert found["Linear"] == "linear"
    assert found["Embedding"] == "embedding"
    assert found["LlamaMLP"] is None


@needs_native
@pytest.mark.parametrize("optimised", [False, True], ids=["pruned", "optimised"])
@pytest.mark.parametrize(("model_type", "kind"), [("bert", "prefill"), ("llama", "decode")])
def test_profile(model_type: str, kind: str, optimised: bool, tmp_path: Path) -> None:
    model = pruned(model_type)
    if optimised:
        optimize_for_cpu(model)
    profile = profile_model(model, Work(kind, 2, 9), name="tiny", seconds=0.4)
    assert profile.layers
    for layer in profile.layers:
        assert layer.seconds > 0
        assert layer.dense_seconds > 0
        assert 0 < layer.kept <= 1
        assert layer.reason in (
            "overhead-bound", "bandwidth-bound", "compute-bound", "misaligned"
        )  # fmt: skip
    covered = sum(len(layer.shapes) for layer in profile.layers)
    assert covered == sum(isinstance(m, nn.Linear) for m in build(model_type).modules())
    assert profile.parts["linear"] > 0
    text = json.dumps(profile.to_dict())
    assert json.loads(text)["losses"] == profile.losses()
    plot_profile(tmp_path / "profile.png", profile)
    assert (tmp_path / "profile.png").read_bytes()[:4] == b"\x89PNG"


@needs_native
def test_a_stack_is_profiled_by_its_stages() -> None:
    model = optimize_for_cpu(pruned("llama"))
    profile = profile_model(model, Work("decode", 1, 9), seconds=0.05)
    prefix = "model.layers.1."
    names = [layer.name for layer in profile.layers if layer.name.startswith(prefix)]
    assert names == [
        prefix + "self_attn.q_proj, k_proj, v_proj", prefix + "self_attn.o_proj",
        prefix + "mlp.gate_proj, up_proj", prefix + "mlp.down_proj",
    ]  # fmt: skip
    stages = [layer for layer in profile.layers if layer.name != "lm_head"]
    assert {layer.floors["overhead"] for layer in stages} == {0.0}
    assert sum(layer.seconds for layer in stages) < profile.parts["linear"]
    assert profile.parts["attention"] > 0
    assert profile.parts["norm"] > 0


@needs_native
def test_a_fused_encoder_layer_is_profiled_by_its_linears() -> None:
    model = optimize_for_cpu(pruned("bert"))
    profile = profile_model(model, Work("prefill", 2, 9), seconds=0.1)
    prefix = "bert.encoder.layer.1."
    lines = [layer for layer in profile.layers if layer.name.startswith(prefix)]
    names = [name for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    assert [layer.name for layer in lines] == [n for n in names if n.startswith(prefix)]
    assert len(lines) == 6
    for layer in lines:
        assert layer.estimated
        assert layer.floors["overhead"] == 0
        (shape,) = layer.shapes
        layout = _cpu.describe(model.get_submodule(layer.name).packed)
        assert shape[2:] == (layout.n_rows, layout.n_columns)
    assert profile.parts["norm"] > 0
    assert not any(layer.estimated for layer in profile.layers if layer.name.startswith("cls"))
    assert all(isinstance(m, FusedEncoderLayer) for m in model.bert.encoder.layer)


@needs_native
@pytest.mark.parametrize("where", ["norm", "rest", "attention"])
def test_the_parts_of_a_fused_block_are_told_apart(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10 ms the Linears take 6, and the norms, Python or attention the other 4."""
    model = optimize_for_cpu(pruned("bert", layers=1))
    (name,) = (n for n, m in model.named_modules() if isinstance(m, FusedEncoderLayer))
    linears = [n for n, m in model.named_modules() if isinstance(m, PackedLinear) and name in n]

    ours, apart = ModuleClock(model), ModuleClock(profiling._apart(model))
    seconds = {n: 1.1e-3 if n in linears else 0.0 for n in apart.parts}
    if where == "norm":
        seconds[f"{name}.output.LayerNorm"] = 4e-3
    monkeypatch.setattr(ours, "inclusive", lambda: {name: 10e-3})
    monkeypatch.setattr(apart, "inclusive", lambda: seconds)
    monkeypatch.setattr(profiling, "_no_rows", lambda *_: 4e-3 if where == "rest" else 0.0)
    apart.rows = dict.fromkeys(linears, 18)
    ceilings = {"call": 1e-4, "bytes": 1e12, "flops": 1e12}
    stages = profiling._estimated_stages(model, ours, apart, ceilings, time.perf_counter)
    parts = dict.fromkeys(("linear", "norm", "rest", "attention"), 0.0)
    for stage in stages:
        parts[stage.part] += stage.seconds
    assert parts == pytest.approx({**dict.fromkeys(parts, 0.0), "linear": 6e-3, where: 4e-3})


@needs_native
def test_blocks_that_take_their_own_forward_are_profiled_by_their_linears() -> None:
    model = optimize_for_cpu(pruned("bert")).half()  # float16 isn't fused
    profile = profile_model(model, Work("prefill", 1, 5), seconds=0.05)
    assert {len(layer.shapes) for layer in profile.layers} == {1}
    assert profile.parts["rest"] > 0


def example() -> ModelProfile:
    floors = {"overhead": 1e-6, "bandwidth": 2e-5, "compute": 8e-5}
    one = LayerProfile("a.query", 8, [(10, 20, 5, 20)], 1e-4, 3e-4, floors, None, "x", True)
    two = LayerProfile("b", 8, [(4, 4, 2, 4), (4, 4, 4, 4)], 2e-4, 2e-4, floors, 0.9, "y")
    parts = {"linear": 2e-4, "attention": 1e-4, "norm": 0.0, "embedding": 0.0, "rest": 1e-4}
    dense = {**parts, "linear": 4e-4}
    return ModelProfile(
        "tiny", Work("prefill", 1, 8), "float32", 1, 4e-4, 6e-4, parts, dense, [one, two], {}, {}
    )


def test_tables() -> None:
    _, one, two = layer_lines(example())
    assert one == ["a.query", "8", "5/10", "20/20", "50 %", "2.00", "3.00", "≈ 100.0",
                   "80 %", "20 %", "x"]  # fmt: skip
    assert two[2:7] == ["2 Linears", "", "75 %", "1.33", "1.00"]
    assert part_lines(example())[1:] == [
        ["linear", "0.4", "0.2", "50 %", "2.00"],
        ["attention", "0.1", "0.1", "25 %", "1.00"],
        ["rest", "0.1", "0.1", "25 %", "1.00"],
        ["whole model", "0.6", "0.4", "100 %", "1.50"],
    ]
    assert loss_text(example()) == (
        "largest losses: attention 0.1 ms (25 %), python/rest 0.1 ms (25 %), y 0.05 ms (12 %)"
    )


@needs_native
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruned("bert").save_pretrained(tmp_path / "pruned")
    words = ["profile", str(tmp_path / "pruned"), "--sequence", "9", "--seconds", "0.05"]
    words += ["--optimize", "--json", str(tmp_path / "p.json"), "--png", str(tmp_path / "p.png")]
    assert cli.main([*words, "--markdown", str(tmp_path / "p.md")]) == 0
    out = capsys.readouterr().out
    assert "why not faster" in out
    assert "largest losses" in out
    assert json.loads((tmp_path / "p.json").read_text())["machine"]["commit"] == commit()
    text = (tmp_path / "p.md").read_text()
    assert commit() in text
    assert text.count("bert.encoder.layer.0.intermediate.dense") == 1
    assert (tmp_path / "p.png").exists()
    assert cli.main(["profile", str(tmp_path), "--threads", "0"]) == 2
    assert "threads must be at least 1, got 0" in capsys.readouterr().err
