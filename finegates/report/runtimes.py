"""What else could serve the same model on this machine: the peers of `finegates bench-model`.

Every runtime gets the dense-shaped model (`finegates.export.dense_model`), which computes what the
pruned one computes, at dense cost, so that all can be held against one reference.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..export import export_onnx
from ..export.graph import input_names, quiet
from .work import Call, Work, is_decoder, serve

Prepare = Callable[[Work, int], Call]


@dataclass(frozen=True)
class Runtime:
    """One way to serve a model.

    Args:
        name: as the tables show it.
        why_not: for a model, a weight type (``"fp32"``, ``"bf16"``, ``"int8"``) and a work the
            reason why it isn't timed, in one line, or None.
        open: takes the dense model, the weight type and an empty folder for its files, and returns
            what makes a call of a work and a number of threads.
    """

    name: str
    why_not: Callable[[Any, str, Work], str | None]
    open: Callable[[Any, str, Path], Prepare]


def torch_runtime(name: str, model: Any) -> Runtime:
    """Return a runtime that serves this very model in transformers."""
    return Runtime(name, lambda *_: None, lambda *_: _open_transformers(model))


def _missing(*packages: str) -> str | None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{absent[0]} is not installed" if absent else None


def _encoder_why_not(
    packages: tuple[str, ...], dtypes: tuple[str, ...]
) -> Callable[[Any, str, Work], str | None]:
    def why_not(model: Any, dtype: str, work: Work) -> str | None:
        if is_decoder(model):
            return "exported decoders have no cache and score every position"
        if dtype not in dtypes:
            return f"it has no {dtype} weights here"
        return _missing(*packages)

    return why_not


def _transformers_why_not(model: Any, dtype: str, work: Work) -> str | None:
    return "it has no int8 Linears" if dtype == "int8" else None


def _open_transformers(model: Any, *_: Any) -> Prepare:
    return lambda work, threads: serve(model, work)


def _compile_why_not(model: Any, dtype: str, work: Work) -> str | None:
    if is_decoder(model):
        return "it compiles again for every cache length"
    return _transformers_why_not(model, dtype, work)


def _open_compiled(model: Any, dtype: str, folder: Path) -> Prepare:
    def prepare(work: Work, threads: int) -> Call:
        torch.compiler.reset()
        ids = work.ids(model.config.vocab_size)[:, : work.length]
        values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with quiet("torch"):  # about its own deprecations
            compiled: Any = torch.compile(model, options={"freezing": True})
            compiled(**values)
        return lambda: compiled(**values)[0]

    return prepare


def _open_onnx(model: Any, dtype: str, folder: Path) -> Prepare:
    import onnxruntime

    path = _onnx_file(model, folder)
    if dtype == "int8":
        from onnxruntime.quantization import quantize_dynamic

        source, path = path, folder / "int8.onnx"
        with quiet(""):  # it recommends preprocessing that torch.onnx has done
            quantize_dynamic(source, path)

    def prepare(work: Work, threads: int) -> Call:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options)
        feed = {name: value.numpy() for name, value in _inputs(model, work).items()}
        first = [session.get_outputs()[0].name]
        return lambda: torch.from_numpy(session.run(first, feed)[0])

    return prepare


def _onnx_file(model: Any, folder: Path) -> Path:
    path = folder / "model.onnx"
    if not path.exists():
        export_onnx(model, path)
    return path


def _inputs(model: Any, work: Work) -> dict[str, Tensor]:
    ids = work.ids(model.config.vocab_size)[:, : work.length]
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: values.get(name, torch.zeros_like(ids)) for name in input_names(model)}


def _open_openvino(model: Any, dtype: str, folder: Path) -> Prepare:
    import openvino

    core = openvino.Core()
    graph = core.read_model(_onnx_file(model, folder))

    def prepare(work: Work, threads: int) -> Call:
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bf16" else "f32",
        }
        request = core.compile_model(graph, "CPU", settings).create_infer_request()
        feed = {name: value.numpy() for name, value in _inputs(model, work).items()}

        def call() -> Tensor:
            request.infer(feed, share_inputs=True)
            return torch.from_numpy(request.get_output_tensor(0).data)

        return call

    return prepare


def _llama_why_not(model: Any, dtype: str, work: Work) -> str | None:
    if getattr(model.config, "model_type", "") != "llama":
        return "it is timed on Llama models only"
    return _missing("llama_cpp", "gguf")


def _open_llama(model: Any, dtype: str, folder: Path) -> Prepare:
    from .llama_cpp import LlamaCpp, write_gguf

    path = folder / f"model-{dtype}.gguf"
    write_gguf(model, path, dtype)
    return lambda work, threads: LlamaCpp(path, work, threads).call(model.config.vocab_size)


PEERS = (
    Runtime("transformers", _transformers_why_not, _open_transformers),
    Runtime("torch.compile", _compile_why_not, _open_compiled),
    Runtime(
        "ONNX Runtime",
        _encoder_why_not(("onnxruntime", "onnx", "onnxscript"), ("fp32", "int8")),
        _open_onnx,
    ),
    Runtime(
        "OpenVINO",
        _encoder_why_not(("openvino", "onnx", "onnxscript"), ("fp32", "bf16")),
        _open_openvino,
    ),
    Runtime("llama.cpp", _llama_why_not, _open_llama),
)
