"""Ops that exist for the GPU: gates sampled inside the GEMM, norm + gather, one fused penalty.

Each is opaque to torch.compile and falls back to `reference`, which gives the same gates for the
same seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import register_fake

from . import dispatch, reference
from .checks import autocasts, check_dtype, check_matrix, check_vector, transformed
from .gated_call import SCHEMA, TENSORS, GatedCall
from .index_map import check_index_map, check_offsets
from .reference import DISTRIBUTIONS
from .schema import _library as library
from .schema import ops

NORMS = ("none", "rms", "layer")

library.define(f"gated_matmul({SCHEMA}, str backend) -> (Tensor, Tensor, Tensor)")
library.define(
    f"gated_matmul_backward(Tensor dy, Tensor y, Tensor r, Tensor c, {SCHEMA}, str backend, "
    "bool[5] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "norm_gather(Tensor x, Tensor columns, Tensor? weight, Tensor? bias, float eps, str norm, "
    "str backend) -> Tensor"
)
library.define(
    "open_mass(Tensor logits, Tensor offsets, str distribution, float shift, float scale, "
    "str backend) -> Tensor"
)
library.define(
    "open_mass_backward(Tensor dout, Tensor logits, Tensor offsets, str distribution, "
    "float shift, float scale, str backend) -> Tensor"
)


def gated_matmul(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    row_logits: Tensor | None,
    column_logits: Tensor | None,
    seed: Tensor | None,
    distribution: str,
    constants: tuple[float, float, float],
    *,
    row_layout: tuple[int, int] | None = None,
    column_layout: tuple[int, int] | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    out_features: int | None = None,
    closed_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y = r ⊙ ((x ⊙ c) wᵀ + b) with r and c sampled from logits inside the op.

    On a GPU one launch samples and multiplies; nothing but x and y is saved, besides the N + K gate
    values themselves. Without ``seed`` the gates have their noise-free values. y is saved only
    where the row gate gets a gradient; it can't be changed in place then (autograd says so).

    With ``rows`` and ``columns`` that keep everything in another order, w and b are in that order:
    put closed gates last and tiles of them are not loaded, forward or backward, while the result is
    the same. With fewer of them (ranking gates only) w is the compact weight of the open rows and
    columns: y[..., rows] = x[..., columns] wᵀ + b, the rest 0, and open gates get the
    straight-through gradient; neither pass touches what is closed.

    Args:
        x (`Tensor` [..., K]): input.
        w (`Tensor` [N, K], or [n, k] compact), b (`Tensor` [N] or [n], *optional*): of x's dtype.
        row_logits, column_logits (`Tensor` fp32 [units], *optional*): a missing side is all ones.
        seed (`Tensor` int64 [2], *optional*): keys of the row and the column noise, on x's device.
        distribution: ``"ranking"``, ``"gaussian"`` or ``"hard_concrete"``.
        constants: (shift, scale, beta), see `GateConfig.constants`.
        row_layout, column_layout: (span, width) of a tied side, see `reference.gate`.
        rows, columns (`Tensor` int32, *optional*): a permutation of the features, or the sorted
            open ones; None for all in order. See `check_index_map` for when their values are read.
        out_features: N where w is compact.
        closed_grad: ranking only, whether closed gates get a gradient.
        backend: see `use_backend`.

    Returns:
        `Tensor` [..., N].

    Raises:
        ValueError: shapes, dtypes, devices, the distribution or the index maps don't fit.
    """
    if autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, b = x.to(dtype), w.to(dtype), None if b is None else b.to(dtype)
    check_matrix(x, w, every_column=columns is None)
    n_out = w.shape[0] if out_features is None else out_features
    call = GatedCall(
        x, w, b, row_logits, column_logits, seed, rows, columns, n_out,
        _span_width(row_layout, n_out), _span_width(column_layout, x.shape[-1]),
        distribution, *constants, closed_grad,
    )  # fmt: skip
    _check(call)
    y: Tensor = ops.gated_matmul.default(*call, backend)[0]
    return y


def _span_width(layout: tuple[int, int] | None, size: int) -> list[int]:
    """Return a side's (span, width); an untied side's unit is the feature itself."""
    return [max(size, 1)] * 2 if layout is None else list(layout)


def _check(call: GatedCall) -> None:
    """Check what `check_matrix` hasn't seen of a call."""
    x, w, b, _, _, seed, rows, columns = call[:TENSORS]
    check_dtype("x", x, w)
    for name, vector, side in (("b", b, 0), ("rows", rows, 0), ("columns", columns, 1)):
        if vector is not None:
            check_vector(name, vector, w, side)
    if b is not None:
        check_dtype("b", b, w)
    if call.distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {call.distribution!r}")
    if call.compact and (call.distribution != "ranking" or call.closed_grad):
        raise ValueError(
            "a compact weight fits ranking gates without closed_grad only, got "
            f"distribution={call.distribution!r}, closed_grad={call.closed_grad}"
        )
    if call.out_features < w.shape[0] or (rows is None and call.out_features != w.shape[0]):
        raise ValueError(f"out_features must fit w's {w.shape[0]} rows, got {call.out_features}")
    if rows is not None:
        check_index_map("rows", rows, call.out_features, w.device)
    if columns is not None:
        check_index_map("columns", columns, call.in_features, w.device)
    if seed is not None and (
        seed.shape != (2,) or seed.dtype != torch.int64 or seed.device != x.device
    ):
        raise ValueError(
            f"seed must be int64 [2] on {x.device}, got {seed.dtype} {tuple(seed.shape)} "
            f"on {seed.device}"
        )
    _check_side("row_logits", call.row_logits, call.row_layout, call.out_features, x)
    _check_side("column_logits", call.column_logits, call.column_layout, call.in_features, x)


def _check_side(name: str, logits: Tensor | None, layout: list[int], size: int, x: Tensor) -> None:
    """Check a side's (span, width) against its size, and its logits against both."""
    if logits is None:
        return
    span, width = layout
    if span < 1 or width < 1 or span % width or size % span:
        raise ValueError(f"layout of {name} must tile {size} features, got {(span, width)}")
    units = size // span * width
    if logits.shape != (units,) or logits.dtype != torch.float32 or logits.device != x.device:
        raise ValueError(
            f"{name} must be fp32 [{units}] on {x.device}, got {logits.dtype} "
            f"{tuple(logits.shape)} on {logits.device}"
        )


def norm_gather(
    x: Tensor,
    columns: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: str = "rms",
    backend: str = "auto",
) -> Tensor:
    """RMSNorm or LayerNorm over all features of x, then only the kept ones: [..., K] → [..., k].

    The producer of a compact input: a pruned Linear behind a norm reads it without a gather. With
    gradients wanted it runs the reference.

    Args:
        x (`Tensor` [..., K]), weight, bias (`Tensor` [K]).
        columns (`Tensor` int32 [k]): as for `gated_matmul`.
        norm: ``"rms"``, ``"layer"`` or ``"none"``.
        backend: see `use_backend`.

    Raises:
        ValueError: shapes, devices, the columns or the norm don't fit.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (vector.shape != x.shape[-1:] or vector.device != x.device):
            raise ValueError(
                f"{name} must have shape {tuple(x.shape[-1:])} on {x.device}, "
                f"got {tuple(vector.shape)} on {vector.device}"
            )
    check_index_map("columns", columns, x.shape[-1], x.device)
    if (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (x, weight, bias))
        or transformed()
    ):
        dispatch.check_differentiable("norm_gather", backend)
        return reference.norm_gather(x, columns, weight, bias, eps, norm)
    y: Tensor = ops.norm_gather.default(x, columns, weight, bias, eps, norm, backend)
    return y


def open_mass(
    logits: Tensor,
    offsets: Tensor,
    distribution: str,
    shift: float,
    scale: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Expected open units of every gate vector of a model, in one launch whatever their number.

    For vectors that decide their units alone; ``surgery/masses.py`` builds the penalty on it. Units
    of several independent gates need the probabilities themselves.

    Args:
        logits (`Tensor` fp32 [U]): ``torch.cat`` of all logits.
        offsets (`Tensor` int64 [S + 1]): where each vector starts, and U.
        distribution, shift, scale: see `reference.open_mass`.
        backend: see `use_backend`.

    Returns:
        `Tensor` fp32 [S], differentiable in the logits.

    Raises:
        ValueError: logits or offsets are not 1-D, of another dtype or device, the offsets don't
            rise from 0 to U, or the distribution is unknown.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
    if logits.dim() != 1:
        raise ValueError(f"logits must be 1-D, got shape {tuple(logits.shape)}")
    check_offsets(offsets, logits.numel(), logits.device)
    mass: Tensor = ops.open_mass.default(logits, offsets, distribution, shift, scale, backend)
    return mass


def _gated_matmul(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    *operands, backend = flat
    call = GatedCall(*operands)
    result: tuple[Tensor, Tensor, Tensor] = dispatch.choose("gated_matmul", backend, call).run(call)
    return result


def _gated_matmul_backward(
    dy: Tensor, y: Tensor, r: Tensor, c: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    *operands, backend, mask = flat
    args = (GatedCall(*operands), dy, y, r, c, mask)
    result: tuple[Tensor, ...] = dispatch.choose("gated_matmul_backward", backend, *args).run(*args)
    return result


def _norm_gather(
    x: Tensor,
    columns: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
    backend: str,
) -> Tensor:
    args = (x, columns, weight, bias, eps, norm)
    result: Tensor = dispatch.choose("norm_gather", backend, *args).run(*args)
    return result


def _open_mass(
    logits: Tensor, offsets: Tensor, distribution: str, shift: float, scale: float, backend: str
) -> Tensor:
    args = (logits, offsets, distribution, shift, scale)
    result: Tensor = dispatch.choose("open_mass", backend, *args).run(*args)
    return result


def _open_mass_backward(
    dout: Tensor,
    logits: Tensor,
    offsets: Tensor,
    distribution: str,
    shift: float,
    scale: float,
    backend: str,
) -> Tensor:
    args = (dout, logits, offsets, distribution, shift, scale)
    result: Tensor = dispatch.choose("open_mass_backward", backend, *args).run(*args)
    return result


for _name, _function in (
    ("gated_matmul", _gated_matmul),
    ("gated_matmul_backward", _gated_matmul_backward),
    ("norm_gather", _norm_gather),
    ("open_mass", _open_mass),
    ("open_mass_backward", _open_mass_backward),
):
    library.impl(_name, _function, "CompositeExplicitAutograd")


@register_fake("finegates::gated_matmul", lib=library)  # type: ignore[untyped-decorator]
def _gated_matmul_fake(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = GatedCall(*flat[:-1])
    return (
        call.x.new_empty(*call.x.shape[:-1], call.out_features),
        _gate_room(call, call.row_logits, call.out_features),
        _gate_room(call, call.column_logits, call.in_features),
    )


def _gate_room(call: GatedCall, logits: Tensor | None, size: int) -> Tensor:
    """Return room for the values of a side: none for a missing side or a compact weight."""
    return call.x.new_empty(0 if logits is None or call.compact else size, dtype=torch.float32)


@register_fake("finegates::gated_matmul_backward", lib=library)  # type: ignore[untyped-decorator]
def _gated_matmul_backward_fake(
    dy: Tensor, y: Tensor, r: Tensor, c: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    *operands, _, mask = flat
    return tuple(
        of.new_empty(of.shape) if want and of is not None else dy.new_empty(0)
        for want, of in zip(mask, operands[:5], strict=True)
    )


@register_fake("finegates::norm_gather", lib=library)  # type: ignore[untyped-decorator]
def _norm_gather_fake(x: Tensor, columns: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns.shape[0])


@register_fake("finegates::open_mass", lib=library)  # type: ignore[untyped-decorator]
def _open_mass_fake(logits: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(offsets.shape[0] - 1)


@register_fake("finegates::open_mass_backward", lib=library)  # type: ignore[untyped-decorator]
def _open_mass_backward_fake(dout: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _gated_matmul_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    y, r, c = output
    ctx.mark_non_differentiable(r, c)
    ctx.set_materialize_grads(False)  # zeros for r and c: two launches that nobody reads
    # As in schema.py: y where it is read, and the backend that this thread asks for.
    kept = y if ctx.needs_input_grad[3] else None
    ctx.save_for_backward(*inputs[:TENSORS], kept, r, c)
    *constants, backend = inputs[TENSORS:]
    ctx.constants = (*constants, dispatch.requested_of("gated_matmul_backward", backend))


# As in schema.py: a second derivative would lose terms silently.
@once_differentiable
def _gated_matmul_grad(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    *operands, y, r, c = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[:5])
    y = dy if y is None else y  # of y's shape; nobody reads it
    grads = ops.gated_matmul_backward(dy, y, r, c, *operands, *ctx.constants, mask)
    wanted = (g if want else None for g, want in zip(grads, mask, strict=True))
    return (*wanted, *[None] * 12)


def _open_mass_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, offsets, *constants, backend = inputs
    ctx.constants = (*constants, dispatch.requested_of("open_mass_backward", backend))
    ctx.save_for_backward(logits, offsets)


@once_differentiable
def _open_mass_grad(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    logits, offsets = ctx.saved_tensors
    dlogits = ops.open_mass_backward(dout.contiguous(), logits, offsets, *ctx.constants)
    return (dlogits, *[None] * 5)


torch.library.register_autograd(
    "finegates::gated_matmul",
    _gated_matmul_grad,
    setup_context=_gated_matmul_context,
    lib=library,
)
torch.library.register_autograd(
    "finegates::open_mass", _open_mass_grad, setup_context=_open_mass_context, lib=library
)
