"""Counts, latencies, table, figure and JSON of a run."""

import copy
import gc
import io
import json
import math
import platform
import time

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from finegates import GateConfig, PrunedLinear, gate_, prune_
from finegates import report as reporting
from finegates.report import (
    Kept,
    Report,
    Row,
    Timing,
    cpu_name,
    kept,
    latency,
    model_removal,
    removal,
)
from finegates.surgery import GateMap, Removal


@pytest.fixture(scope="module")
def models():
    """Dense, gated at 40 % with some gates per side, and pruned versions of a small BERT."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=16,
    )
    dense = BertForSequenceClassification(config).eval()
    gated = gate_(copy.deepcopy(dense), GateConfig())
    gates = GateMap(gated)
    with torch.no_grad():
        for gate in gates.gates():
            gate.logits.normal_()
    gates.project_(0.4)
    return dense, gated, prune_(copy.deepcopy(gated))


def test_kept_agrees_before_and_after_pruning(models):
    dense, gated, pruned = models
    layers = kept(dense, pruned)
    assert layers == kept(dense, gated) == kept(gated, pruned)
    assert removal(layers) == GateMap(gated).removal()
    assert removal(layers).fraction == pytest.approx(0.4, abs=0.01)
    assert [layer.name for layer in layers][:2] == [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.self.key",
    ]
    first = layers[0]
    assert (first.rows, first.columns) == (24, 24)
    assert first.fraction == first.kept_rows * first.kept_columns / 576
    assert first.to_dict()["fraction"] == first.fraction


def test_layers_that_lost_nothing_stay_in_the_count():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    gated = gate_(copy.deepcopy(model), GateConfig(modules=("*",)))
    with torch.no_grad():
        gated[0].row_gate.logits[0] = -1.0
    pruned = prune_(copy.deepcopy(gated))
    assert type(pruned[1]) is nn.Linear
    assert kept(gated, pruned) == [Kept("0", 6, 4, 5, 4), Kept("1", 2, 6, 2, 6)]
    assert [layer.name for layer in kept(model, pruned)] == ["0"]
    assert kept(model, pruned, ["0", "1"]) == kept(gated, pruned)


def test_removal_of_the_whole_model_counts_weights_and_biases(models):
    dense, gated, pruned = models
    count = model_removal(dense, pruned)
    assert count.total == sum(p.numel() for p in dense.parameters())
    assert count.removed == count.total - sum(p.numel() for p in pruned.parameters())
    assert count == model_removal(dense, gated) == model_removal(gated, pruned)
    assert count == model_removal(gated, gated)
    biases = sum(layer.rows - layer.kept_rows for layer in kept(dense, pruned))
    assert count.removed == removal(kept(dense, pruned)).removed + biases


def test_parameters_count_shared_ones_once_and_gates_only_as_trainable(models):
    dense, gated, _ = models
    assert reporting.parameters(gated) == reporting.parameters(dense)
    logits = sum(gate.logits.numel() for gate in GateMap(gated).gates())
    others = sum(
        p.numel() for n, p in gated.named_parameters() if p.requires_grad and "gate" not in n
    )
    assert reporting.trainable(gated) == logits + others
    tied = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    tied[1].weight = tied[0].weight
    assert reporting.parameters(tied) == 15


def test_kept_names_what_it_cannot_find(models):
    dense, _, pruned = models
    with pytest.raises(ValueError, match="no gated or pruned Linear"):
        kept(dense, dense)
    with pytest.raises(ValueError, match="names: before has no module 'nowhere'"):
        kept(dense, pruned, ["nowhere"])
    with pytest.raises(ValueError, match="'bert.embeddings' of before is a BertEmbeddings, no Lin"):
        kept(dense, pruned, ["bert.embeddings"])


def test_folder_size(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "deep" / "b").write_bytes(b"345")
    assert reporting.folder_size(tmp_path) == 5
    with pytest.raises(ValueError, match="path must be a folder, got"):
        reporting.folder_size(tmp_path / "a")


class Recorder(nn.Module):
    """Notes what holds while it runs, and takes a fixed time."""

    def __init__(self, name, log, milliseconds=0.0):
        super().__init__()
        self.name, self.log, self.seconds = name, log, milliseconds / 1e3

    def forward(self, x):
        state = (self.training, torch.is_inference_mode_enabled(), gc.isenabled())
        self.log.append((self.name, torch.get_num_threads(), state))
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass
        return x


def test_latency_interleaves_and_restores():
    log = []
    models = {"a": Recorder("a", log), "b": Recorder("b", log)}
    models["a"].train()
    models["b"].eval()
    before = torch.get_num_threads()
    timings = latency(
        models, {"x": torch.ones(1)}, [1, 2], seconds=0.0, warmup=1, min_rounds=3, max_rounds=3
    )
    assert [(t.model, t.threads, t.rounds) for t in timings] == [
        ("a", 1, 3),
        ("b", 1, 3),
        ("a", 2, 3),
        ("b", 2, 3),
    ]
    assert "".join(name for name, threads, _ in log if threads == 1) == "ababbaab"
    assert {state for *_, state in log} == {(False, True, False)}
    assert torch.get_num_threads() == before
    assert gc.isenabled()
    assert models["a"].training
    assert not models["b"].training


def test_latency_measures_medians_and_speedups():
    log = []
    models = {"slow": Recorder("slow", log, 4.0), "fast": Recorder("fast", log, 1.0)}
    slow, fast = latency(models, {"x": {"x": torch.ones(1)}}, [1], seconds=0.0, min_rounds=11)
    assert 4.0 <= slow.p10 <= slow.median <= slow.p90
    assert 1.0 <= fast.p10 <= fast.median <= fast.p90
    assert slow.speedup == 1.0
    assert fast.speedup > 1.5


def test_latency_keeps_its_budget_and_its_bounds():
    log = []
    models = {"a": Recorder("a", log, 1.0)}
    arguments = {"models": models, "inputs": {"x": torch.ones(1)}, "threads": [1], "warmup": 0}
    (timing,) = latency(**arguments, seconds=60.0, max_rounds=4, min_rounds=2)
    assert timing.rounds == 4
    (timing,) = latency(**arguments, seconds=0.0, max_rounds=100, min_rounds=2)
    assert timing.rounds == 2


def test_latency_defaults_to_one_thread_and_all():
    all_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        models = {"a": nn.Linear(2, 2)}
        timings = latency(models, {"x": torch.ones(1, 2)}, seconds=0.0, min_rounds=1)
    finally:
        torch.set_num_threads(all_threads)
    assert [t.threads for t in timings] == [1, 2]


def test_latency_restores_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        latency({"a": nn.Linear(2, 2)}, {"x": torch.ones(1, 3)}, [before + 1])
    assert torch.get_num_threads() == before
    assert gc.isenabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, "models must not be empty"),
        ({"inputs": {}}, "inputs must not be empty"),
        ({"threads": [0]}, "threads must be at least 1, got 0"),
        ({"threads": []}, "threads must be at least 1"),
        ({"min_rounds": 0}, "min_rounds must be at least 1, got 0"),
        ({"max_rounds": 0}, "max_rounds must be at least 1, got 0"),
    ],
)
def test_latency_names_bad_arguments(changes, message):
    arguments = {"models": {"a": nn.Identity()}, "inputs": {"x": torch.ones(1)}, **changes}
    with pytest.raises(ValueError, match=message):
        latency(**arguments)


ROWS = (
    Row("head + biases", 0.77, trainable=17_010, disk=91_000_000),
    Row("full fine-tuning", 0.856, trainable=22_713_986, disk=91_000_000),
    Row("gated", 0.814, 44_546, 0.4, 0.40004, 0.1872, 91_700_000),
    Row("pruned", 0.814, None, 0.4, 0.40004, 0.1872, 74_100_000),
    Row("reloaded", 0.814, None, 0.4, 0.40004, 0.1872, 74_100_000),
)
TIMINGS = tuple(
    Timing(model, inputs, threads, median, median, median, speedup, 10)
    for inputs in ("batch 1", "batch 32")
    for threads in (1, 2)
    for model, median, speedup in (("full fine-tuning", 9.364, 1.0), ("reloaded", 0.9996, 9.368))
)
LAYERS = tuple(
    Kept(f"bert.encoder.layer.{depth}.{kind}", 24, 24, 24 - depth, 12 + depth)
    for depth in range(6)
    for kind in ("attention.self.query", "intermediate.dense")
)
REPORT = Report({"model": "m", "seed": 0}, "accuracy", ROWS, TIMINGS, LAYERS)


def test_table_fits_80_columns_and_shows_everything():
    console = Console(width=80, file=io.StringIO())
    console.print(reporting.table(REPORT))
    text = console.file.getvalue()
    assert "…" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "accuracy 77.0 % 85.6 % 81.4 % 81.4 % 81.4 %",
        "gated weights, removed 40.0 % 40.0 % 40.0 %",
        "trained parameters 17.0 k 22.7 M 44.5 k",
        "size on disk 91.0 MB 91.0 MB 91.7 MB 74.1 MB 74.1 MB",
        "batch 32, 2 threads 9.36 ms 1.00 ms",
    ):
        assert line in lines
    assert lines.count("speed-up 1.00× 9.37×") == 4


def test_a_processor_is_told_from_another_of_its_name(tmp_path):
    processor = "cpu family\t: {}\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\n"
    (tmp_path / "two").write_text(processor.format(26) + processor.format(25))
    (tmp_path / "arm").write_text("processor\t: 0\nmodel name\t: Some ARM\n")
    assert cpu_name(tmp_path / "two") == "AMD EPYC (family 26, model 2)"
    assert cpu_name(tmp_path / "arm") == "Some ARM"
    assert cpu_name(tmp_path / "none") == (platform.processor() or platform.machine())


def test_markdown_has_a_cell_per_model_and_drops_empty_lines():
    text = reporting.markdown(Report({}, "matthews", [Row("only", 0.5)]))
    assert text == "|  | only |\n| --- | ---: |\n| matthews | 50.0 % |\n"


def test_report_json_is_versioned_and_atomic(tmp_path):
    path = tmp_path / "report.json"
    reporting.write_report(path, REPORT)
    found = json.loads(path.read_text())
    assert found["version"] == reporting.REPORT_VERSION
    assert found["job"] == {"model": "m", "seed": 0}
    assert found["rows"][2]["removed"] == 0.40004
    assert found["timings"][1]["speedup"] == 9.368
    assert found["layers"][0]["name"] == "bert.encoder.layer.0.attention.self.query"
    assert found["machine"]["torch"] == torch.__version__
    before = path.read_bytes()
    for job in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises(ValueError, match="^report: "):
            reporting.write_report(path, Report(job, "accuracy", ROWS))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_score_that_is_nan_is_null(tmp_path):
    nan = float("nan")
    report = Report({}, "pearson", [Row("only", nan)], splits={"test": nan, "other": 0.5})
    reporting.write_report(tmp_path / "report.json", report)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["rows"][0]["score"] is None
    assert found["splits"] == {"test": None, "other": 0.5}


@pytest.mark.parametrize(
    "layers",
    [
        LAYERS,
        [Kept(f"model.layers.{i}.self_attn.q_proj", 8, 8, 4, 8) for i in range(24)],
        [Kept("0", 8, 6, 4, 3), Kept("2", 8, 6, 0, 6)],
    ],
    ids=["bert", "deep", "no-depth"],
)
def test_figure_is_a_png_without_side_effects(tmp_path, layers):
    backend, figures = mpl.rcParams["backend"], plt.get_fignums()
    reporting.plot_kept(tmp_path / "kept.png", layers, "title")
    assert (mpl.rcParams["backend"], plt.get_fignums()) == (backend, figures)
    image = imread(tmp_path / "kept.png")
    assert min(image.shape[:2]) > 200
    assert [file.name for file in tmp_path.iterdir()] == ["kept.png"]


def test_figure_needs_layers(tmp_path):
    with pytest.raises(ValueError, match="layers must not be empty"):
        reporting.plot_kept(tmp_path / "kept.png", [])
    assert list(tmp_path.iterdir()) == []


def test_scores_are_written_as_their_metric_is():
    rows = [Row("dense", 4.3678, step=0.0123), Row("gated", 123.456, step=1.5)]
    text = reporting.markdown(Report({}, "perplexity", rows))
    assert "| perplexity | 4.37 | 123 |" in text
    assert "| training step | 12.3 ms | 1500 ms |" in text
    assert "| loss | 4.368 | 123.456 |" in reporting.markdown(Report({}, "loss", rows))


def test_lines_below_the_table():
    report = Report(
        {}, "accuracy", ROWS, splits={"test": 0.8125}, ratios={"loss": 1.0204},
        samples={"dense": "Once\nupon a time"},
    )  # fmt: skip
    assert reporting.lines(report) == [
        "test: accuracy 81.2 % (reloaded)",
        "loss, gated / dense: 1.020",
        "dense: Once upon a time",
    ]


def test_gate_histogram_counts_every_gate_once_and_tells_open_from_closed(models):
    _, gated, _ = models
    gates = GateMap(gated)
    counts = reporting.gate_histogram(gates)
    assert len(counts) == reporting.GATE_BINS
    margins = torch.cat([gate.logits - gate.config.closing_logit for gate in gates.gates()])
    assert sum(counts) == len(margins)
    assert sum(counts[reporting.GATE_BINS // 2 :]) == int((margins > 0).sum())
    with torch.no_grad():
        for gate in (alike := GateMap(copy.deepcopy(gated))).gates():
            gate.logits.fill_(gate.config.closing_logit + 0.1)
    # m / (0.1 + |m|) = 1/2, the edge between the upper half's two halves.
    assert reporting.gate_histogram(alike)[3 * reporting.GATE_BINS // 4] == len(margins)


HISTORY = {
    "dense": [{"loss": 2.0, "step": 1}, {"eval_loss": 1.5, "step": 1}, {"loss": 1.0, "step": 2}],
    "gated": [
        {"loss": 2.0, "step": 1, "removed": 0.0, "gates": [0] * 20 + [3] * 20},
        {"eval_loss": 1.5, "eval_accuracy": 0.6, "step": 1, "removed": 0.0},
        {"loss": float("inf"), "step": 2, "removed": 0.4, "gates": [1] * 40},
        {"eval_loss": 1.2, "eval_accuracy": 0.7, "step": 2, "removed": 0.4},
        {"train_runtime": 1.0, "step": 2},
    ],
}


@pytest.mark.parametrize("metric", ["accuracy", "perplexity", "loss"])
@pytest.mark.parametrize("history", [HISTORY, {}], ids=["history", "none"])
def test_training_figure_draws_what_there_is(tmp_path, monkeypatch, metric, history):
    drawn = []
    axes = mpl.axes.Axes
    plot, show = axes.plot, axes.imshow

    def noting(self, *args, **kwargs):
        drawn.append(([float(v) for v in np.atleast_1d(args[0])], args[1]))
        return plot(self, *args, **kwargs)

    def noting_image(self, image, **kwargs):
        drawn.append(("image", np.shape(image)))
        return show(self, image, **kwargs)

    monkeypatch.setattr(axes, "plot", noting)
    monkeypatch.setattr(axes, "imshow", noting_image)
    report = Report({}, metric, ROWS, history=history)
    reporting.plot_training(tmp_path / "training.png", report, "title")
    assert min(imread(tmp_path / "training.png").shape[:2]) > 200
    assert ([0.40004], 0.814) in drawn
    assert (("image", (reporting.GATE_BINS, 2)) in drawn) is bool(history)
    expected = {"accuracy": (0.6, 0.7), "loss": (1.5, 1.2)}
    expected["perplexity"] = tuple(map(math.exp, expected["loss"]))
    assert (([0.0, 0.4], expected[metric]) in drawn) is bool(history)
    assert (([1.0, 2.0], (2.0, 1.0)) in drawn) is bool(history)


def test_removal_of_an_emptied_layer():
    layer = PrunedLinear.from_linear(nn.Linear(4, 3), rows=torch.tensor([], dtype=torch.int64))
    layers = kept(nn.Sequential(nn.Linear(4, 3)), nn.Sequential(layer))
    assert layers == [Kept("0", 3, 4, 0, 4)]
    assert removal(layers) == Removal(12, 12)
