"""A pruned model as a graph of plain operators: ONNX, and from it OpenVINO."""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import PrunedLinear
from ..ops.reference import ACTIVATION_FUNCTIONS
from .dense import replaced

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Beyond this the weights go into a file of their own: a protobuf ends at 2 GB.
_ONE_FILE = 1_500_000_000
# A runtime's gather moves single elements. Measured per element as multiply-adds of its GEMM, with
# 40 % removed of 768x768, 3072x768 and 768x3072 at 128 rows, by a trial.
_GATHER_COST = {"onnx": 256, "openvino": 32}


class PlainLinear(nn.Module):
    """y[..., rows] = act(x[..., columns] wᵀ + b) of a `PrunedLinear`, in runtimes' operators.

    Args:
        layer: the pruned layer.
        runtime: ``"onnx"`` scatters the kept rows into zeros; ``"openvino"``, whose scatter is
            slow, gathers them from the result and a zero. Columns are gathered where that costs
            less than multiplying by zeros.
    """

    def __init__(self, layer: PrunedLinear, runtime: str) -> None:
        super().__init__()
        weight, columns = layer.weight.detach(), layer.columns
        self.scatters, self.out_features = runtime == "onnx", layer.out_features
        if columns is not None:
            removed = weight.shape[0] * (layer.in_features - len(columns))
            if removed < _GATHER_COST[runtime] * len(columns):
                wide = weight.new_zeros(weight.shape[0], layer.in_features)
                weight, columns = wide.index_copy(1, columns.long(), weight), None
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias
        self.activation = ACTIVATION_FUNCTIONS[layer.activation]
        self.register_buffer("columns", None if columns is None else columns.long())
        rows = None if layer.rows is None else layer.rows.long()
        if rows is not None and not self.scatters:
            n = len(rows)
            rows = torch.full((layer.out_features,), n).index_copy(0, rows, torch.arange(n))
        self.register_buffer("rows", rows)

    columns: Tensor | None
    rows: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to y [..., N]."""
        if self.columns is not None:
            x = x.index_select(-1, self.columns)
        y = self.activation(F.linear(x, self.weight, self.bias))
        if self.rows is None:
            return y
        if self.scatters:
            return y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, self.rows, y)
        return F.pad(y, (0, 1)).index_select(-1, self.rows)


def export_onnx(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a pruned model as fp32 ONNX (opset 18 or newer) with batch and length free.

    Its inputs are those of `INPUTS` that the model tells apart, int64 [batch, length]; its outputs
    the model's own by their names in transformers. A decoder scores whole sequences, without a
    cache. Weights beyond 1.5 GB go into a second file beside the first.

    Args:
        model: a `PreTrainedModel`, pruned, optimised or plain; it is not changed.
        path: of the ``.onnx`` file.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the model has gated layers.
    """
    _write_onnx(model, path, "onnx")


def export_openvino(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a pruned model as OpenVINO, by way of ONNX; see `export_onnx`.

    Weights are fp32; ``INFERENCE_PRECISION_HINT`` makes the runtime compute in bf16.

    Args:
        model: a `PreTrainedModel`, pruned, optimised or plain; it is not changed.
        path: of the ``.xml`` file; the weights go into the ``.bin`` file beside it.

    Raises:
        ImportError: onnx, onnxscript or openvino is not installed.
        ValueError: the model has gated layers.
    """
    import openvino

    with tempfile.TemporaryDirectory(prefix="finegates-") as folder:
        file = Path(folder, "model.onnx")
        _write_onnx(model, file, "openvino")
        openvino.save_model(openvino.convert_model(file), path, compress_to_fp16=False)


def _write_onnx(model: Any, path: str | os.PathLike[str], runtime: str) -> None:
    import onnxscript  # noqa: F401 - what torch.onnx needs, before any work is done

    plain = replaced(model, lambda _, layer: PlainLinear(layer, runtime)).eval().float()
    if hasattr(plain.config, "use_cache"):
        plain.config.use_cache = False
    example = {name: torch.ones(2, 8, dtype=torch.int64) for name in input_names(plain)}
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        outputs = [name for name, value in plain(**example).items() if isinstance(value, Tensor)]
    size = sum(p.numel() * p.element_size() for p in plain.parameters())
    with quiet("torch.onnx"):  # about packages that it misses, and its own deprecations
        torch.onnx.export(
            plain,
            (),
            str(path),
            kwargs=example,
            dynamic_shapes=dict.fromkeys(example, free),
            input_names=list(example),
            output_names=outputs,
            dynamo=True,
            external_data=size > _ONE_FILE,
            verbose=False,
        )


def input_names(model: Any) -> list[str]:
    """Return which of `INPUTS` the model tells apart."""
    known = inspect.signature(model.forward).parameters
    kinds = getattr(model.config, "type_vocab_size", 0)
    return [n for n in INPUTS if n in known and (n != "token_type_ids" or (kinds or 0) > 1)]


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Keep back warnings, and what a logger says below errors."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
