"""What the launchers of a gated Linear share: its weight and its gates, as kernels take them."""

from typing import NamedTuple

from torch import Tensor


class Weight(NamedTuple):
    """w [N, K] and b [N] of one dtype, and the features that their positions are.

    ``rows`` int32 [N] and ``columns`` int32 [K] are index maps, None for all in order.
    ``precision`` says how fp32 products are taken: ``"ieee"`` or ``"tf32"``.
    """

    w: Tensor
    b: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    precision: str = "ieee"

    @property
    def mapped(self) -> bool:
        """Whether a side has an index map."""
        return self.rows is not None or self.columns is not None


class Gates(NamedTuple):
    """Both gate vectors of one layer: their values, and how the kernels get them.

    ``row`` and ``column`` are ``"none"``, ``"value"`` or a distribution, the same one on both sides
    if both sample: r [N_out] and c [K_in] are read for ``"value"`` and written for a distribution;
    backward reads them wherever they are given. A side's (span, width) spreads its units over its
    features, see `gate_tile`.
    """

    row: str = "none"
    column: str = "none"
    r: Tensor | None = None
    c: Tensor | None = None
    row_logits: Tensor | None = None
    column_logits: Tensor | None = None
    seed: Tensor | None = None
    row_layout: tuple[int, int] = (1, 1)
    column_layout: tuple[int, int] = (1, 1)
    shift: float = 0.0
    scale: float = 1.0
    beta: float = 1.0

    @property
    def logits(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the logits in the kernels' order."""
        return self.row_logits, self.column_logits

    @property
    def scalars(self) -> tuple[int, int, int, int, float, float, float]:
        """Return the layouts and constants in the kernels' order."""
        return (*self.row_layout, *self.column_layout, self.shift, self.scale, self.beta)
