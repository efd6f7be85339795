"""`GatedCall`: one call of the gated Linear with gates sampled inside, as backends take it."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor

TENSORS: Final = 8
# The fields below, in their order, as the ops' schemas write them.
SCHEMA = (
    "Tensor x, Tensor w, Tensor? b, Tensor? row_logits, Tensor? column_logits, Tensor? seed, "
    "Tensor? rows, Tensor? columns, int out_features, int[2] row_layout, int[2] column_layout, "
    "str distribution, float shift, float scale, float beta, bool closed_grad"
)


class GatedCall(NamedTuple):
    """The operands of `gated_matmul`, which says what they are; its backward takes the same ones.

    The `TENSORS` come first, so that the autograd rule can save them in one slice.
    """

    x: Tensor
    w: Tensor
    b: Tensor | None
    row_logits: Tensor | None
    column_logits: Tensor | None
    seed: Tensor | None
    rows: Tensor | None
    columns: Tensor | None
    out_features: int
    row_layout: list[int]
    column_layout: list[int]
    distribution: str
    shift: float
    scale: float
    beta: float
    closed_grad: bool

    @property
    def in_features(self) -> int:
        """K of the dense layer."""
        return self.x.shape[-1]

    @property
    def compact(self) -> bool:
        """Whether an index map leaves features out, instead of only reordering them."""
        sides = ((self.rows, self.out_features), (self.columns, self.in_features))
        return any(kept is not None and kept.shape[0] != size for kept, size in sides)

    @property
    def law(self) -> tuple[str, float, float, float]:
        """The distribution and its constants, as `reference.gate` takes them."""
        return self.distribution, self.shift, self.scale, self.beta
