"""Counts of parameters: kept, removed, trained, stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..gates import Gate
from ..nn import FusedGatedLinear, PrunedLinear
from ..surgery import GateMap, Removal, Side


@dataclass(frozen=True)
class Kept:
    """What is left of one Linear.

    Args:
        name: of the module.
        rows, columns: N and K before.
        kept_rows, kept_columns: n and k after.
    """

    name: str
    rows: int
    columns: int
    kept_rows: int
    kept_columns: int

    @property
    def fraction(self) -> float:
        """Kept fraction of the weight, n k / (N K)."""
        return self.kept_rows * self.kept_columns / (self.rows * self.columns)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the fraction, as JSON values."""
        return {**asdict(self), "fraction": self.fraction}


def kept(before: nn.Module, after: nn.Module, names: Sequence[str] | None = None) -> list[Kept]:
    """Return what is left of each Linear.

    Args:
        before: the dense or the gated model, for the sizes; it may be on the meta device.
        after: the pruned model, or the gated one, whose dead rows and columns count as removed.
        names: the Linears; None takes those that are gated in either model or pruned in ``after``.

    Raises:
        ValueError: a name isn't a Linear in both models, or nothing is gated or pruned.
    """
    if names is None:
        chosen = {n for n, m in before.named_modules() if isinstance(m, FusedGatedLinear)}
        kinds = (FusedGatedLinear, PrunedLinear)
        chosen |= {n for n, m in after.named_modules() if isinstance(m, kinds)}
        names = [name for name, _ in after.named_modules() if name in chosen]
        if not names:
            raise ValueError("after has no gated or pruned Linear; name the Linears")
    gated = any(isinstance(module, FusedGatedLinear) for module in after.modules())
    alive = {side: int(a.sum()) for side, a in GateMap(after).alive().items()} if gated else {}
    layers = []
    for name in names:
        rows, columns = _shape("before", before, name)
        kept_rows, kept_columns = _shape("after", after, name)
        kept_rows = alive.get(Side(name, "row"), kept_rows)
        kept_columns = alive.get(Side(name, "column"), kept_columns)
        layers.append(Kept(name, rows, columns, kept_rows, kept_columns))
    return layers


def _shape(argument: str, model: nn.Module, name: str) -> tuple[int, int]:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"names: {argument} has no module {name!r}") from None
    if not isinstance(module, (nn.Linear, PrunedLinear)):
        raise ValueError(f"names: {name!r} of {argument} is a {type(module).__name__}, no Linear")
    rows, columns = module.weight.shape
    return rows, columns


def removal(layers: Sequence[Kept]) -> Removal:
    """Sum up the parameters of the layers' weights, and those removed."""
    total = sum(layer.rows * layer.columns for layer in layers)
    return Removal(total, total - sum(layer.kept_rows * layer.kept_columns for layer in layers))


def model_removal(before: nn.Module, after: nn.Module) -> Removal:
    """Count the whole model's parameters, and those removed: weights and biases, no gates.

    Args:
        before: the dense or the gated model.
        after: the pruned model, or the gated one, whose dead rows and columns count as removed.
    """
    total = parameters(before)
    if not any(isinstance(module, FusedGatedLinear) for module in after.modules()):
        return Removal(total, total - parameters(after))
    removed = 0
    for layer in kept(after, after):
        removed += layer.rows * layer.columns - layer.kept_rows * layer.kept_columns
        if getattr(after.get_submodule(layer.name), "bias", None) is not None:
            removed += layer.rows - layer.kept_rows
    return Removal(total, removed)


def parameters(model: nn.Module) -> int:
    """Return the number of parameters without gates; shared ones count once."""
    gates = {id(p) for m in model.modules() if isinstance(m, Gate) for p in m.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in gates)


GATE_BINS = 40


def gate_histogram(gates: GateMap) -> list[int]:
    """Return how many gates lie how far from their closing edge, tied ones counted once.

    With m = θ - closing logit the bins divide m / (0.1 + |m|), which is in (-1, 1), evenly into
    `GATE_BINS`; the upper half is open.
    """
    margins = torch.cat([g.logits.detach() - g.config.closing_logit for g in gates.gates()])
    squashed = (margins / (0.1 + margins.abs())).float().cpu()
    counts: list[int] = torch.histc(squashed, GATE_BINS, -1.0, 1.0).int().tolist()
    return counts


def trainable(model: nn.Module) -> int:
    """Return the number of parameters that get a gradient, gates included; shared count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def folder_size(path: str | os.PathLike[str]) -> int:
    """Return the bytes of all files of a folder.

    Raises:
        ValueError: it is not a folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"path must be a folder, got {str(path)!r}")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
