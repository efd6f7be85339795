"""`optimize_for_cpu`: pack every Linear of a model and fuse the blocks we know; and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

from torch import nn

from .. import _native
from ..nn import FusedGatedLinear, PrunedLinear
from .file_pages import FilePages
from .fused import FusedBlock
from .packed_embedding import PackedEmbedding
from .packed_linear import PackedLinear, check_weight_dtype, why_not

Model = TypeVar("Model", bound=nn.Module)

# Which of our modules knows the blocks of a module of transformers; imported when one is met, it
# has a dict ``FUSED`` from their classes to subclasses of FusedBlock.
_FAMILIES = {
    "transformers.models.bert.modeling_bert": ".bert",
    "transformers.models.roberta.modeling_roberta": ".bert",
    "transformers.models.llama.modeling_llama": ".llama",
    "transformers.models.mistral.modeling_mistral": ".llama",
    "transformers.models.qwen2.modeling_qwen2": ".llama",
}
_FROZEN = "_frozen_by_optimize_for_cpu"


def optimize_for_cpu(model: Model, weight_dtype: str | None = None) -> Model:
    """Pack every Linear of a model for the CPU kernels, in place, and fuse the blocks we know.

    The model stays what it was to its caller: same class, same forward, `generate`, pipelines,
    `state_dict` and `save_pretrained` with the same keys. It is put into evaluation mode, and its
    parameters stop to require gradients. Every weight is held once, packed: an input embedding tied
    to an output layer reads its rows there. Only a weight that other modules share is packed beside
    it. Pages of a checkpoint's file are handed back to the system once they are packed. Layers that
    can't be packed (on another device, fp64, with hooks or parametrizations) stay.

    Args:
        model: any module that holds Linears or `PrunedLinear`s; prune gated ones first.
        weight_dtype: None for each layer's own, ``"int8"`` for int8 with one scale a row (rounds to
            nearest: error ≤ scale / 2; `restore_` gives the rounded weights back).

    Returns:
        The same model.

    Raises:
        ValueError: ``weight_dtype`` is unknown, the model has gated layers or is itself a Linear,
            or the native kernels are missing (the message says why).

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
        >>> x = torch.randn(3, 8)
        >>> before = model(x)
        >>> torch.testing.assert_close(optimize_for_cpu(model)(x), before)
        >>> type(restore_(model)[0]).__name__
        'Linear'
    """
    check_weight_dtype(weight_dtype)
    if not _native.available():
        raise ValueError(f"the native kernels are missing: {_native.reason()}")
    for name, module in model.named_modules():
        if isinstance(module, FusedGatedLinear):
            raise ValueError(f"{name or 'model'} is gated; call prune_(model) first")
    if why_not(model) is None:
        raise ValueError("model is a Linear itself; put it in a container to replace it")
    model.eval()
    _freeze(model)
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    embeddings = {
        id(m.weight): m
        for m in model.modules()
        if type(m) is nn.Embedding and m.max_norm is None and owners[id(m.weight)] == 2
    }
    pages = FilePages()
    for parameter in model.parameters():
        pages.let_go(parameter)  # loading may have read all of them

    def packed(layer: nn.Module) -> nn.Module:
        if not isinstance(layer, (nn.Linear, PrunedLinear)) or why_not(layer) is not None:
            return layer
        weight, embedding = layer.weight, embeddings.get(id(layer.weight))
        own = layer.named_parameters(recurse=False)
        shared = {n: p for n, p in own if owners[id(p)] > 1 and (p is not weight or not embedding)}
        new = PackedLinear(layer, weight_dtype, shared)
        pages.let_go(weight)
        if embedding is not None:
            PackedEmbedding.take(embedding, new)
        return new

    _replace(model, packed)
    for module in model.modules():
        _fuse(module)
    return model


def restore_(model: Model) -> Model:
    """Undo `optimize_for_cpu` in place: the layers and blocks it found, bit for bit.

    int8 weights come back rounded. The model stays in evaluation mode; what required a gradient
    does so again.

    Returns:
        The same model; one that wasn't optimized is left as it is.
    """
    for module in model.modules():
        if isinstance(module, (FusedBlock, PackedEmbedding)):
            module.release()
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        model.eval()  # a refused train() stops half-way
    _replace(model, lambda m: m.unpack() if isinstance(m, PackedLinear) else m)
    for module in model.modules():  # parts may have been optimized before the whole
        for name in module.__dict__.pop(_FROZEN, ()):
            module.get_parameter(name).requires_grad_(True)
    return model


def _freeze(model: nn.Module) -> None:
    """Let no activation ask for a gradient, and note what did."""
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    model.__dict__.setdefault(_FROZEN, trainable)
    model.requires_grad_(False)


def _replace(model: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> None:
    """Put replacements in place, one for each module however many names it has.

    One by one, so that a replaced layer's memory is free before the next is packed; the largest
    first, while little else is packed.
    """
    names: dict[int, list[str]] = {}
    sizes: dict[int, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        sizes[id(module)] = sum(p.numel() for p in module.parameters(recurse=False))
    for key in sorted(names, key=lambda key: -sizes[key]):
        same = names[key]
        if same[0]:
            module = model.get_submodule(same[0])
            new = replacement(module)
            if new is not module:
                for name in same:
                    model.set_submodule(name, new)


def _fuse(module: nn.Module) -> None:
    family = _FAMILIES.get(type(module).__module__)
    if family is None:
        return
    fused: dict[type, type[FusedBlock]] = import_module(family, __package__).FUSED
    block = fused.get(type(module))
    if block is not None and block.why_not(module) is None:
        block.take(module)
