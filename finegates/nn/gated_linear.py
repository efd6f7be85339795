"""`FusedGatedLinear`: a drop-in `nn.Linear` with a gate per row and per column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import GateConfig
from ..gates import Gate
from ..ops import INTERPRETED, gated_linear, gated_matmul
from ..ops.checks import transformed
from ..ops.index_map import trust_index_map
from .lora import LoRA


class _Ordered(NamedTuple):
    """A weight with closed gates last, the order of its sides, and its source's state."""

    weight: Tensor
    rows: Tensor | None
    columns: Tensor | None
    source: tuple[int, int]


# As wide as the tiles are in which the kernels skip closed gates.
_TILE = 64


def _closed_last(gate: Gate | None) -> Tensor | None:
    """Return the gate's features with the closed ones last, None if they fill no tile."""
    if gate is None:
        return None
    closed = gate.value() == 0
    if closed.sum() < _TILE:
        return None
    order = torch.argsort(closed.int(), stable=True).int()
    trust_index_map(order, len(order))
    return order


class Held(NamedTuple):
    """The features of a side that a shrunk layer computes with.

    Args:
        features (`Tensor` int32, *optional*): in rising order; None for all.
        living (`Tensor` int32, *optional*): 1 for a living feature and 0 for a dead one, which only
            fills their number up to what a GPU loads at once; None where all live.
    """

    features: Tensor | None = None
    living: Tensor | None = None

    def part(self, tensor: Tensor, side: int) -> Tensor:
        """Return these features of dimension ``side``, with 0 for the dead ones.

        The tensor itself where that is everything.
        """
        if self.features is not None:
            tensor = tensor.index_select(side, self.features)
        if self.living is not None:
            tensor = tensor * (self.living[:, None] if side < tensor.dim() - 1 else self.living)
        return tensor


class _Compact(NamedTuple):
    """What `FusedGatedLinear.shrink_` keeps of a layer, and what it was kept for."""

    weight: Tensor | None
    rows: Held
    columns: Held
    inner_rows: bool
    inner_columns: bool
    sources: tuple[tuple[Tensor, int, int], ...]

    def holds(self) -> bool:
        """Whether no source has changed or moved."""
        return all(_state(t) == (address, version) for t, address, version in self.sources)


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version


class FusedGatedLinear(nn.Linear):
    """y = r ⊙ ((x ⊙ c) wᵀ + b) with learned gates r [N] on rows and c [K] on columns.

    With ``config.lora_rank`` it is y = r ⊙ ((x ⊙ c)(w + s B A)ᵀ + b), see `LoRA`.

    State dict: ``weight``, ``bias`` (only if the base has one), ``row_gate.logits`` and
    ``column_gate.logits`` (fp32, each only if ``config`` gates that side), ``lora.down`` and
    ``lora.up`` (only with a LoRA).

    While ``fixed`` is set, training computes with the values of evaluation, without noise.

    With all gates open the output is that of the plain Linear: on the torch backend bit for bit,
    also for an x that is not contiguous. Not if x overlaps itself in memory other than by
    ``expand`` of leading dimensions, or doesn't start at an address that is aligned as a fresh
    tensor's: BLAS may sum in another order there. While the row gate is trained, the output is kept
    for its gradient, so that an in-place operation may not follow (``nn.ReLU(inplace=True)``
    raises in the backward).

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        config: the gates' distribution and constants; None takes `GateConfig`'s defaults.

    Example:
        >>> layer = FusedGatedLinear(8, 4, config=GateConfig(sparsity=0.5)).eval()
        >>> layer(torch.ones(2, 8)).shape
        torch.Size([2, 4])
    """

    row_gate: Gate | None
    column_gate: Gate | None
    lora: LoRA | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: GateConfig | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._attach(GateConfig() if config is None else config)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: GateConfig | None = None) -> FusedGatedLinear:
        """Return a gated layer that shares the weight and bias parameters of ``linear``.

        Raises:
            TypeError: ``linear`` is not an `nn.Linear`.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._attach(GateConfig() if config is None else config)
        return layer.train(linear.training)

    def _attach(self, config: GateConfig) -> None:
        device = self.weight.device
        self._ordered: _Ordered | None = None
        self._compact: _Compact | None = None
        self.fixed = False
        self.config = config
        self.row_gate = Gate(self.out_features, config, device=device) if config.rows else None
        self.column_gate = Gate(self.in_features, config, device=device) if config.columns else None
        self.lora = None
        if config.lora_rank:
            self.lora = LoRA(self.in_features, self.out_features, config, device, self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to y [..., N]; gates are sampled in training, noise-free in evaluation.

        Raises:
            ValueError: x's last dimension, dtype or device doesn't fit the weight's.
        """
        compact = self._compact
        # Tracing and torch.func see the whole layer: sizes that change would compile it anew.
        if (
            compact is not None
            and not (torch.compiler.is_compiling() or transformed())
            and compact.holds()
        ):
            return self._compute_compact(x, compact)
        seed = None
        noisy = self.training and not self.fixed
        if noisy and self.config.distribution != "ranking":
            seed = torch.randint(0, 2**31 - 1, (2,), device=x.device)
        in_kernel = (x.is_cuda or INTERPRETED) and not transformed()
        if in_kernel and self.lora is None:
            return self._sample_in_kernel(x, seed)
        keys = (None, None) if seed is None else (seed[:1], seed[1:])
        r, c = (
            None if gate is None else gate(key) if noisy else gate.value()
            for gate, key in zip((self.row_gate, self.column_gate), keys, strict=True)
        )
        if in_kernel:
            y = self._sample_in_kernel(x, seed)
        else:
            y = gated_linear(
                x,
                self.weight,
                self.bias,
                r,
                c,
                closed_row_grad=self._closed_grad,
                backend=self.config.backend,
            )
        return y if self.lora is None else y + self.lora(x, r, c)

    @torch.no_grad()
    def shrink_(
        self,
        rows: Held,
        columns: Held,
        *,
        inner_rows: bool = False,
        inner_columns: bool = False,
        sources: Sequence[Tensor] = (),
    ) -> None:
        """Compute with the given rows and columns of a ranking layer alone, forward and backward.

        The result is that of the gates as long as these rows and columns are the open ones, but
        closed gates get no gradient. Ends with `expand_`, or by itself once a source has changed
        in a way that its version counter tells; the whole layer computes then.

        Args:
            rows, columns: the open features and what fills them up. A frozen weight is gathered
                again where they are other objects than last time.
            inner_rows, inner_columns: y holds the given rows side by side, x the given columns:
                for features that only layers see that are shrunk together.
            sources: the logits and frozen weights for which rows and columns hold.

        Raises:
            ValueError: the gates are not ranking gates.
        """
        if self.config.distribution != "ranking":
            raise ValueError(f"distribution must be 'ranking', got {self.config.distribution!r}")
        old, weight = self._compact, None
        if not self.weight.requires_grad:
            if (
                old is not None
                and old.weight is not None
                and any(t is self.weight and _state(t) == (a, v) for t, a, v in old.sources)
                and old.rows is rows
                and old.columns is columns
            ):
                weight = old.weight
            else:
                weight = columns.part(rows.part(self.weight.detach(), 0), 1)
        stamped = tuple((source, *_state(source)) for source in sources)
        self._compact = _Compact(weight, rows, columns, inner_rows, inner_columns, stamped)

    def expand_(self) -> None:
        """Compute with the whole weight again."""
        self._compact = None

    def _compute_compact(self, x: Tensor, compact: _Compact) -> Tensor:
        rows, columns = compact.rows, compact.columns
        weight = compact.weight
        if weight is None:
            weight = columns.part(rows.part(self.weight, 0), 1)
        bias: Tensor | None = self.bias
        if bias is not None:
            bias = rows.part(bias, 0)
        row = _side(self.row_gate, rows.features, compact.inner_rows)
        column = _side(self.column_gate, columns.features, compact.inner_columns)
        y = gated_matmul(
            x,
            weight,
            bias,
            row.logits,
            column.logits,
            None,
            self.config.distribution,
            self.config.constants,
            row_layout=row.layout,
            column_layout=column.layout,
            rows=row.kept,
            columns=column.kept,
            out_features=None if row.kept is None else self.out_features,
            backend=self.config.backend,
        )
        if self.lora is None:
            return y
        gates = (self.row_gate, self.column_gate)
        r, c = (None if gate is None else gate.value() for gate in gates)
        # Times its own value, a closed gate keeps its 0 and loses its gradient.
        r, c = (None if z is None else z * z.detach() for z in (r, c))
        update: Tensor = self.lora(
            x,
            r,
            c,
            rows.features if compact.inner_rows else None,
            columns.features if compact.inner_columns else None,
        )
        return y + update

    @torch.no_grad()
    def reorder_(self) -> None:
        """Put closed gates last in a copy of the frozen weight: a GPU then skips their tiles.

        No result changes beyond the order of summation; gates, noise and state dict keep theirs.
        Call it again every few dozen steps, as gates close, or let ``config.reorder_every`` do it.
        The copy takes as much memory as the weight, and is ignored once the weight has changed or
        moved. There is none where nothing would be skipped: on a CPU, and while no side has closed
        as many gates as a tile is wide.

        Raises:
            ValueError: the weight is trained.
        """
        if self.weight.requires_grad:
            raise ValueError("weight must be frozen: a copy in another order would not be trained")
        self._ordered = None
        if not (self.weight.is_cuda or INTERPRETED):
            return
        rows, columns = (_closed_last(gate) for gate in (self.row_gate, self.column_gate))
        if rows is None and columns is None:
            return
        weight: Tensor = self.weight.detach()
        weight = weight if rows is None else weight[rows]
        weight = weight if columns is None else weight[:, columns]
        self._ordered = _Ordered(weight.contiguous(), rows, columns, _state(self.weight))

    def _operands(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return weight, bias, rows and columns as the kernels take them: ordered if that holds."""
        ordered = self._ordered
        if (
            ordered is None
            or torch.compiler.is_compiling()
            or self.weight.requires_grad
            or ordered.source != _state(self.weight)
        ):
            return self.weight, self.bias, None, None
        bias: Tensor | None = self.bias
        if bias is not None and ordered.rows is not None:
            bias = bias.index_select(0, ordered.rows)
        return ordered.weight, bias, ordered.rows, ordered.columns

    @property
    def _closed_grad(self) -> bool:
        return self.config.distribution == "ranking" and self.config.closed_gradient

    def _sample_in_kernel(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """Hand the logits to the op, which samples inside the GEMM: one launch for the layer."""
        row, column, config = self.row_gate, self.column_gate, self.config
        weight, bias, rows, columns = self._operands()
        return gated_matmul(
            x,
            weight,
            bias,
            None if row is None else row.logits,
            None if column is None else column.logits,
            seed,
            config.distribution,
            config.constants,
            row_layout=None if row is None else row.span_width,
            column_layout=None if column is None else column.span_width,
            rows=rows,
            columns=columns,
            closed_grad=self._closed_grad,
            backend=config.backend,
        )

    def gate(self, axis: str) -> Gate | None:
        """Return the gate of ``"row"`` or ``"column"``, None when that side has none."""
        return self.row_gate if axis == "row" else self.column_gate

    def extra_repr(self) -> str:
        """Return the Linear's sizes and the gates' distribution for `repr`."""
        return f"{super().extra_repr()}, distribution={self.config.distribution!r}"


class _Side(NamedTuple):
    """A side as `gated_matmul` takes it."""

    logits: Tensor | None
    layout: tuple[int, int] | None
    kept: Tensor | None


def _side(gate: Gate | None, kept: Tensor | None, inner: bool) -> _Side:
    """Return a shrunk side; where the tensor holds the kept features alone, so do the logits."""
    if gate is None:
        return _Side(None, None, None if inner else kept)
    if not inner or kept is None:
        return _Side(gate.logits, gate.span_width, kept)
    return _Side(gate.spread(gate.logits).index_select(0, kept), None, None)
