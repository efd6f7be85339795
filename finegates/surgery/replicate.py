"""Gates of a model whose weights are sharded over processes: whole and equal everywhere."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from .budget import GateMap


def replicate_(model: nn.Module) -> set[nn.Parameter]:
    """Average the logits' gradients over all processes after every backward.

    For wrappers that shard parameters: the budget is met on every process from whole, equal logits,
    so that they must be left out of the sharding, which then doesn't reduce their gradients.
    DistributedDataParallel replicates anyway and needs no call. Calling it in one process changes
    nothing.

    Args:
        model: a model that `gate_` has gated, before it is wrapped.

    Returns:
        The distinct logits: ``fully_shard(model, ignored_params=replicate_(model))``.

    Raises:
        ValueError: the model has no gated layer.
    """
    logits = {gate.logits for gate in GateMap(model).gates()}
    for parameter in logits:
        parameter.register_post_accumulate_grad_hook(_average)  # type: ignore[no-untyped-call]
    return logits


def _average(parameter: Tensor) -> None:
    # Gradients accumulate between steps: what is there from before is equal everywhere already,
    # and stays so.
    if parameter.grad is not None and dist.is_initialized():
        parameter.grad /= dist.get_world_size()
        dist.all_reduce(parameter.grad)
