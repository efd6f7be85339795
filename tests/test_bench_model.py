"""`finegates bench-model`: wrong and absent runtimes are named, right ones timed, all written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import finegates
from finegates import PrunedLinear, _native, cli
from finegates.recipes.shapes import shaped_model
from finegates.report import bench_model as bench_module
from finegates.report.bench_model import Cell, ModelBench, Result, bench_model
from finegates.report.bench_table import bench_lines, bench_markdown, lead, plot_bench, reasons
from finegates.report.memory import memory_of
from finegates.report.runtimes import PEERS, Runtime
from finegates.report.timing import commit, machine
from finegates.report.work import STRIDE, Work, serve
from serving_case import pruned
from tiny_models import build

needs_native = pytest.mark.skipif(not _native.available(), reason="no native module")


def test_work_is_checked_and_named() -> None:
    work = Work("decode", 2, 5)
    assert (work.label, work.tokens, Work("prefill", 2, 5).tokens) == ("decode 2×5", 2, 10)
    assert torch.equal(work.ids(50), work.ids(50))
    with pytest.raises(ValueError, match="kind must be 'prefill' or 'decode', got 'train'"):
        Work("train", 1, 1)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        Work("decode", 0, 1)


@torch.inference_mode()
def test_decode_continues_and_starts_again() -> None:
    model, work = build("llama"), Work("decode", 2, 5)
    step, ids = serve(model, work), work.ids(model.config.vocab_size)
    steps = [step() for _ in range(STRIDE + 1)]
    whole = model(input_ids=ids).logits
    for i, logits in enumerate(steps[:STRIDE]):
        torch.testing.assert_close(logits, whole[:, 5 + i], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steps[STRIDE], steps[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="BertForMaskedLM doesn't write tokens"):
        serve(build("bert"), work)


@needs_native
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_ours_and_transformers_are_checked_and_timed(model_type: str) -> None:
    works = [Work("prefill", 2, 7)] + [Work("decode", 2, 7)] * (model_type == "llama")
    seen: list[Result] = []
    results = bench_model(
        pruned(model_type),
        works,
        dtypes=["fp32", "int8"],
        threads=[1, 2],
        peers=["transformers"],
        seconds=0.01,
        progress=seen.append,
    )
    assert results == seen
    for dtype, timed in (
        ("fp32", {"transformers", "pruned", "optimized"}),
        ("int8", {"optimized"}),
    ):
        for work in works:
            for threads in (1, 2):
                here = [r for r in results if r.cell == Cell(dtype, work, threads)]
                assert {r.runtime for r in here if r.p50 is not None} == timed
                for r in here:
                    if r.p50 is not None and r.p90 is not None and r.p99 is not None:
                        assert 0 < r.p50 <= r.p90 <= r.p99
                        assert r.tokens_per_second == pytest.approx(1e3 * work.tokens / r.p50)
                        assert r.error is not None
                        assert r.error < (1e-4 if dtype == "fp32" else 0.2)
    assert reasons(ModelBench("m", 0.1, results)) == ["transformers int8: it has no int8 Linears"]


@needs_native
def test_wrong_and_broken_runtimes_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("it\nfell over")

    def coarse(model: Any, *_: Any) -> Any:
        return lambda work, _: lambda: 1.007 * serve(model, work)()

    peers = (
        Runtime("coarse", lambda *_: None, coarse),
        Runtime("wrong", lambda *_: None, lambda *_: lambda w, _: lambda: torch.ones(2, 7, 61)),
        Runtime("nan", lambda *_: None, lambda *_: lambda w, _: lambda: torch.ones(2, 7, 61) / 0),
        Runtime("shape", lambda *_: None, lambda *_: lambda w, _: lambda: torch.ones(2, 7)),
        Runtime("broken", lambda *_: None, broken),
    )
    monkeypatch.setattr(bench_module, "PEERS", peers)
    results = bench_model(pruned("bert"), [Work("prefill", 2, 7)], dtypes=["fp32"], seconds=0.01)
    found = {r.runtime: r for r in results}
    for name in ("wrong", "nan", "shape"):
        assert str(found[name].reason).startswith("wrong result, not timed: relative error ")
        assert found[name].p50 is None
    assert found["broken"].reason == "RuntimeError: it fell over"
    assert found["coarse"].error == pytest.approx(7e-3, rel=0.01)
    assert found["coarse"].p50 is not None
    assert found["optimized"].p50 is not None


@needs_native
def test_decoding_is_held_against_reading_the_kept_weights() -> None:
    model = pruned("llama")
    results = bench_model(
        model, [Work("decode", 1, 7), Work("prefill", 1, 7)], dtypes=["bf16", "int8"],
        peers=["transformers"], seconds=0.01,
    )  # fmt: skip
    linears = (m for m in model.modules() if isinstance(m, (nn.Linear, PrunedLinear)))
    kept = sum(m.weight.numel() for m in linears)
    found = [(r.cell.dtype, r.cell.work.kind, r.runtime) for r in results if r.bandwidth]
    assert found == [("bf16", "decode", "optimized"), ("int8", "decode", "optimized")]
    for r in results:
        if r.bandwidth is None or r.p50 is None:
            assert r.share_of_bandwidth is None
            continue
        assert r.weight_bytes == kept * (2 if r.cell.dtype == "bf16" else 1)
        assert 1e9 < r.bandwidth < 1e12
        assert r.share_of_bandwidth == pytest.approx(r.weight_bytes / r.bandwidth * 1e3 / r.p50)


@needs_native
def test_a_dense_model_runs_once_in_transformers() -> None:
    results = bench_model(build("bert"), [Work("prefill", 1, 7)], dtypes=["fp32"], peers=[],
                          seconds=0.01)  # fmt: skip
    assert [r.runtime for r in results] == ["optimized"]


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_commit(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.check_output(command, text=True).strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert commit(package) == finegates.__version__
    git("init", "-q")
    assert commit(package) == finegates.__version__
    git("add", ".")
    git("commit", "-q", "-m", "m")
    assert commit(package) == git("rev-parse", "HEAD")
    (tmp_path / "results.json").write_text("{}")
    git("add", ".")
    assert commit(package) == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("1")
    assert commit(package) == git("rev-parse", "HEAD") + " and changes"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="peers must be of .*, got 'tensorflow'"):
        bench_model(pruned("bert"), [Work("prefill", 1, 4)], peers=["tensorflow"])
    with pytest.raises(ValueError, match=r"dtypes must be of \('fp32', 'bf16', 'int8'\), got 'f8'"):
        bench_model(pruned("bert"), [Work("prefill", 1, 4)], dtypes=["f8"])


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("peer", ["ONNX Runtime", "OpenVINO", "llama.cpp", "torch.compile"])
def test_installed_peers_compute_the_same(peer: str) -> None:
    """Each runtime's own way of reading the model; timed cells have passed the error check."""
    heads = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 32}
    model = pruned("llama", layers=1, **heads) if peer == "llama.cpp" else pruned("bert", layers=1)
    works = [Work("prefill", 2, 7)] + [Work("decode", 2, 7)] * (peer == "llama.cpp")
    (runtime,) = (runtime for runtime in PEERS if runtime.name == peer)
    if reason := runtime.why_not(model, "fp32", works[0]):
        pytest.skip(reason)
    for result in bench_model(model, works, dtypes=["fp32"], peers=[peer], seconds=0.01):
        assert result.reason is None
        assert result.error is not None
        assert result.error < 2e-3


def example() -> ModelBench:
    work = Work("prefill", 1, 16)
    one, two = Cell("fp32", work, 1), Cell("bf16", work, 1)
    times = {"transformers": 8.0, "OpenVINO": 6.0, "pruned": 5.0, "optimized": 3.0}
    results = [Result(n, one, t, t, t, 16e3 / t, 5, 1e-6) for n, t in times.items()]
    results.append(Result("OpenVINO", two, reason="it is not installed"))
    return ModelBench("tiny", 0.3, results, machine=machine())


def test_tables_and_figure(tmp_path: Path) -> None:
    bench = example()
    assert lead(bench.cells()[Cell("fp32", Work("prefill", 1, 16), 1)].values()) == (
        2.0,
        "OpenVINO",
    )
    header, first, second = bench_lines(bench)
    assert header[3:7] == ["transformers", "OpenVINO", "pruned", "optimized"]
    assert first[3:] == ["8", "6", "5", "3", "2.00 (OpenVINO)", "5333", ""]
    assert second[3:] == ["–", "–", "–", "–", "", "", ""]
    text = bench_markdown(bench)
    assert "30.0 % of its parameters removed" in text
    assert f"commit {commit()}" in text
    assert f"{torch.get_num_threads()} threads" in text
    assert "Not timed: OpenVINO bf16: it is not installed." in text
    assert json.loads(json.dumps(bench.to_dict()))["results"][0]["cell"]["work"]["batch"] == 1
    plot_bench(tmp_path / "bench.png", bench)
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="must have a timed result"):
        plot_bench(tmp_path / "none.png", ModelBench("tiny", 0.0, []))


@needs_native
@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    model = pruned("bert")
    model.save_pretrained(tmp_path)
    memory = memory_of("pruned", tmp_path, Work("prefill", 1, 4), "--optimize")
    assert memory.model == "pruned"
    assert 0 < memory.weights < memory.resident <= memory.peak
    with pytest.raises(ValueError, match=r"the process that serves '.*gone' failed: .*gone"):
        memory_of("gone", tmp_path / "gone", Work("prefill", 1, 4))


def test_shapes() -> None:
    tiny = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    model = shaped_model("minilm", 0.4, torch.bfloat16, **tiny)
    assert model.dtype == torch.bfloat16
    assert model.config.quantization_config["state"] == "pruned"
    dense = shaped_model("smollm2", 0.0, **tiny, num_key_value_heads=2, vocab_size=99)
    assert not hasattr(dense.config, "quantization_config")
    with pytest.raises(ValueError, match="shape must be one of .*, got 'gpt'"):
        shaped_model("gpt", 0.4)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1"):
        shaped_model("minilm", 1)


@needs_native
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = pruned("bert")
    model.save_pretrained(tmp_path / "pruned")
    files = [tmp_path / name for name in ("b.json", "b.md", "b.png")]
    words = ["bench-model", str(tmp_path / "pruned"), "--batch", "1", "--sequence", "8,4000"]
    words += ["--dtype", "fp32", "--threads", "1", "--peers", "transformers", "--seconds", "0.01"]
    words += ["--no-memory", "--json", str(files[0]), "--markdown", str(files[1])]
    assert cli.main([*words, "--png", str(files[2])]) == 0
    out = capsys.readouterr().out
    assert "prefill 1×8" in out
    assert "4000" not in out
    assert all(file.exists() for file in files)
    bench = ModelBench.from_dict(json.loads(files[0].read_text()))
    assert (bench.shape, bench.sparsity, bench.machine) == (None, None, machine())
    for wrong, message in (
        (["bench-model"], "give either MODEL or --shape"),
        (["bench-model", "m", "--bars"], "--bars needs --shape"),
        (["export", str(tmp_path / "pruned"), str(tmp_path)], "out must be a new or empty folder"),
    ):
        assert cli.main(wrong) == 2
        assert message in capsys.readouterr().err


def test_export_command(tmp_path: Path) -> None:
    model = pruned("bert")
    model.save_pretrained(tmp_path / "pruned")
    (tmp_path / "pruned" / "tokenizer.json").write_text("{}")
    assert cli.main(["export", str(tmp_path / "pruned"), str(tmp_path / "dense")]) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "dense").iterdir()
    }
