"""`LoRA`: a low-rank update inside the gates of a Linear."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GateConfig


class LoRA(nn.Module):
    """r ⊙ (s B A (c ⊙ x)) with A = ``down`` [rank, K], B = ``up`` [N, rank], s = alpha / rank.

    The gates scale the factors, (A ⊙ c) and (s r ⊙ B), not the activations: two skinny products
    beside the layer's own, through which autograd reaches A, B, r and c; w + s B A is never built.
    A closed row adds exactly 0, a closed column nothing.

    Factors are fp32, or fp64 beside an fp64 weight, as peft keeps them beside a half-precision one,
    and are cast to x's dtype once they carry the gates.

    Args:
        in_features, out_features: K and N.
        config: ``lora_rank``, ``lora_alpha``, ``lora_dropout``.
        device: of the factors.
        dtype: of the weight beside them.

    Source: Hu et al. 2021, arXiv 2106.09685; initialised as in peft: A Kaiming-uniform (a = √5), B
    zero, so that a fresh LoRA changes nothing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: GateConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        rank, dtype = config.lora_rank, torch.promote_types(dtype, torch.float32)
        self.scale = config.lora_alpha / rank
        self.down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A as `nn.Linear` draws its weight, set B to 0."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5.0))
        nn.init.zeros_(self.up)

    def forward(
        self,
        x: Tensor,
        r: Tensor | None,
        c: Tensor | None,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Map x [..., K] to what the update adds to y [..., N].

        Args:
            r (`Tensor` [N], *optional*), c (`Tensor` [K], *optional*): gate values; None is open.
            rows, columns (`Tensor` int32, *optional*): the features that y and x hold, None for
                all.
        """
        down = self.down if c is None else self.down * c
        up = self.scale * (self.up if r is None else self.up * r[:, None])
        down = down if columns is None else down.index_select(1, columns)
        up = up if rows is None else up.index_select(0, rows)
        return F.linear(F.linear(self.dropout(x), down.to(x.dtype)), up.to(x.dtype))

    def delta(self) -> Tensor:
        """Return s B A [N, K]: what `prune_` adds to the weight."""
        return self.scale * (self.up @ self.down).detach()

    def extra_repr(self) -> str:
        """Return rank and scale for `repr`."""
        return f"rank={self.down.shape[0]}, scale={self.scale:g}"
