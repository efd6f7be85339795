"""`finegates export`: a pruned model for those who don't have finegates."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .. import report
from ..export import export_dense, export_onnx, export_openvino
from ..export.dense import plain_config
from .models import load_model, model_path

# Beside the weights: what tokenizers are read from.
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model")


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, convert and write.

    Raises:
        ValueError, OSError: the model can't be loaded or exported, or OUT holds files.
    """
    parser = argparse.ArgumentParser(prog="finegates export", description=__doc__)
    parser.add_argument("model", help="folder or hub id of a pruned model")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument(
        "--format",
        choices=("dense", "onnx", "openvino"),
        default="dense",
        help="dense: its architecture's shapes with zeros, for transformers, llama.cpp or vLLM; "
        "onnx: model.onnx; openvino: openvino_model.xml",
    )
    given = parser.parse_args(arguments)
    if given.out.exists() and any(given.out.iterdir()):
        raise ValueError(f"out must be a new or empty folder, got {str(given.out)!r}")
    model = load_model(given.model)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.format == "dense":
        export_dense(model, given.out)
    else:
        plain_config(model).save_pretrained(given.out)
        if given.format == "onnx":
            export_onnx(model, given.out / "model.onnx")
        else:
            export_openvino(model, given.out / "openvino_model.xml")
    _copy_tokenizer(Path(model_path(given.model)), given.out)
    size = report.folder_size(given.out) / 1e6
    Console().print(f"{given.out}: {given.format}, {size:.1f} MB", highlight=False)


def _copy_tokenizer(source: Path, out: Path) -> None:
    for pattern in _TOKENIZER:
        for file in source.glob(pattern):
            shutil.copy2(file, out / file.name)


if __name__ == "__main__":
    main(sys.argv[1:])
