"""Backend choice below the op boundary: an ordered table whose entries answer "why not".

The request is the first of: the layer's own ``backend`` argument, the innermost `use_backend`
context, ``FINEGATES_BACKEND``. ``auto`` takes the first implementation that can serve the call; a
named backend that can't raises with its reason. A context or the environment speaks to all ops at
once, so those that have no such backend take ``auto``; a layer's own request for one raises.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _env, _native
from . import (
    _cpu,
    _cpu_blocks,
    _native_gated,
    _triton,
    _triton_gated,
    packing,
    reference,
    reference_blocks,
)

_log = logging.getLogger("finegates")
_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Args:
        backend: its public name.
        why_not: called with the op's arguments; a one-line reason, or None when it can serve.
        run: called with the op's arguments.
        status: called without arguments; why the backend can't serve any call here, or None.
        variant: what tells two implementations of one backend apart, in `table` and in the log.
    """

    backend: str
    why_not: Callable[..., str | None]
    run: Callable[..., Any]
    status: Callable[[], str | None]
    variant: str = ""

    @property
    def name(self) -> str:
        """The backend, with its variant in parentheses."""
        return f"{self.backend} ({self.variant})" if self.variant else self.backend


def _never_refuses(*_: Any) -> None:
    return None


def _torch(run: Callable[..., Any]) -> Implementation:
    return Implementation("torch", _never_refuses, run, _never_refuses)


def _native_why_not(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    *_: object,
) -> str | None:
    return native_operands_why_not(w, b, rows, columns) or _cpu.why_not(x, w)


def native_operands_why_not(*operands: Tensor | None) -> str | None:
    """Return why w, b, rows and columns can't be packed for the native kernels, or None."""
    present = [t for t in operands if t is not None]
    if any(t.is_inference() for t in present):
        return "w, b, rows or columns was made in inference mode, where changes can't be seen"
    if any(t.is_neg() for t in present):
        return "w or b is a negative view"
    return None


def _pruned_linear_native(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    out_features: int,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    entry = packing.entry(w, b, rows, columns, out_features, x.shape[-1])
    return _cpu.pruned_linear(x, entry.packed, out_features, activation, residual)


def _packed_why_not(x: Tensor, *_: object) -> str | None:
    return _cpu.why_not(x)


def _packed_embedding_why_not(ids: Tensor, *_: object) -> str | None:
    return None if ids.is_cpu else f"ids are on {ids.device}, not on the CPU"


def _packed_embedding_torch(ids: Tensor, packed: Tensor, *args: Any) -> Tensor:
    return reference.packed_embedding(ids, _cpu.unpack(packed), *args)


def _packed_linear_torch(x: Tensor, packed: Tensor, *args: Any) -> Tensor:
    return reference.packed_linear(x, _cpu.unpack(packed), *args)


def _packed_linears_torch(x: Tensor, packed: list[Tensor], sizes: list[int]) -> list[Tensor]:
    return reference.packed_linears(x, [_cpu.unpack(p) for p in packed], sizes)


def _packed_glu_torch(x: Tensor, gate: Tensor, up: Tensor, *args: Any) -> Tensor:
    return reference.packed_glu(x, _cpu.unpack(gate), _cpu.unpack(up), *args)


def _encoder_layer_why_not(x: Tensor, *_: object) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"x is {x.dtype}, not float32 or bfloat16"
    return _cpu.why_not(x)


def encoder_layer_torch(x: Tensor, packed: Sequence[Tensor], *args: Any) -> Tensor:
    """Run the reference on unpacked copies of the weights."""
    inner = _cpu.describe(packed[4]).out_features
    return reference_blocks.encoder_layer(x, [_cpu.unpack(p) for p in packed], inner, *args)


def _decoder_why_not(x: Tensor, *_: object) -> str | None:
    reason = _cpu.why_not(x)
    return "x is float16" if reason is None and x.dtype == torch.float16 else reason


def _decoder_native(x: Tensor, packed: list[Tensor], norms: list[Tensor], *args: Any) -> Tensor:
    return _cpu_blocks.decoder(x, _cpu_blocks.DecoderLayers(packed, norms), *args)


def _decoder_torch(x: Tensor, packed: list[Tensor], *args: Any) -> Tensor:
    layers = [(_cpu.unpack(p), _cpu.describe(p).out_features) for p in packed]
    return reference_blocks.decoder(x, layers, *args)


def _packed_row(
    native: Callable[..., Any],
    unpacked: Callable[..., Any],
    why_not: Callable[..., str | None] = _packed_why_not,
) -> tuple[Implementation, ...]:
    """Nothing is packed without the extension, so torch needs it here as well."""
    return (
        Implementation("native", why_not, native, _native.reason),
        Implementation("torch", lambda *_: _native.reason(), unpacked, _native.reason),
    )


def _triton_entry(
    why_not: Callable[..., str | None], run: Callable[..., Any], variant: str = ""
) -> Implementation:
    return Implementation("triton", why_not, run, _triton.status, variant)


# Of the two Triton entries of gated_matmul exactly one serves a call: by shape, see `_fold_wins`.
TABLE: dict[str, tuple[Implementation, ...]] = {
    "pruned_linear": (
        Implementation("native", _native_why_not, _pruned_linear_native, _native.reason),
        _triton_entry(_triton.pruned_why_not, _triton.pruned_linear),
        _torch(reference.pruned_linear),
    ),
    "packed_embedding": _packed_row(
        _cpu.embedding, _packed_embedding_torch, _packed_embedding_why_not
    ),
    "packed_linear": _packed_row(_cpu.pruned_linear, _packed_linear_torch),
    "packed_linears": _packed_row(_cpu.pruned_linears, _packed_linears_torch),
    "packed_glu": _packed_row(_cpu.pruned_glu, _packed_glu_torch),
    "encoder_layer": _packed_row(
        _cpu_blocks.encoder_layer, encoder_layer_torch, _encoder_layer_why_not
    ),
    "decoder": _packed_row(_decoder_native, _decoder_torch, _decoder_why_not),
    "gated_linear": (
        _triton_entry(_triton_gated.why_not, _triton_gated.gated_linear),
        _torch(reference.gated_linear),
    ),
    "gated_linear_backward": (
        _triton_entry(_triton_gated.backward_why_not, _triton_gated.gated_linear_backward),
        _torch(reference.gated_linear_backward),
    ),
    "gated_matmul": (
        Implementation("native", _native_gated.why_not, _native_gated.gated_matmul, _native.reason),
        _triton_entry(_triton_gated.fused_why_not, _triton_gated.gated_matmul_fused, "fused"),
        _triton_entry(_triton_gated.fold_why_not, _triton_gated.gated_matmul_fold, "folded"),
        _torch(reference.gated_matmul),
    ),
    "gated_matmul_backward": (
        Implementation(
            "native", _native_gated.why_not, _native_gated.gated_matmul_backward, _native.reason
        ),
        _triton_entry(
            _triton_gated.fused_why_not, _triton_gated.gated_matmul_backward_fused, "fused"
        ),
        _triton_entry(
            _triton_gated.fold_why_not, _triton_gated.gated_matmul_backward_fold, "folded"
        ),
        _torch(reference.gated_matmul_backward),
    ),
    "norm_gather": (
        _triton_entry(_triton.norm_gather_why_not, _triton.norm_gather),
        _torch(reference.norm_gather),
    ),
    "open_mass": (
        _triton_entry(_triton.open_mass_why_not, _triton.open_mass),
        _torch(reference.open_mass),
    ),
    "open_mass_backward": (
        _triton_entry(_triton.open_mass_backward_why_not, _triton.open_mass_backward),
        _torch(reference.open_mass_backward),
    ),
}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Request a backend for every finegates op inside the block that has it; others take auto.

    A backward asks for what its forward asked for, in whatever thread it runs. Where gradients are
    wanted of an op that only torch can differentiate (`pruned_linear`, `norm_gather`), torch runs
    it. What gradient checkpointing computes again on a GPU runs in autograd's thread, which sees
    the environment and no block.

    Args:
        name: ``"auto"``, ``"torch"``, ``"native"`` or ``"triton"``.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> with use_backend("torch"):
        ...     requested_backend("auto")
        'torch'
    """
    _check_name(name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def _check_name(backend: str) -> None:
    if backend not in _env.BACKENDS:
        raise ValueError(f"backend must be one of {_env.BACKENDS}, got {backend!r}")


def requested_backend(layer: str) -> str:
    """Return the backend asked for: the layer's, else the context's, else the environment's.

    Raises:
        ValueError: an unknown name.
    """
    _check_name(layer)
    if layer != "auto":
        return layer
    return _requested.get() or _env.backend()


def requested_of(op: str, layer: str) -> str:
    """Return the backend asked for among those that ``op`` has.

    A context or the environment speaks to the ops that have its backend: others take ``"auto"``.
    """
    wanted = requested_backend(layer)
    has_it = any(entry.backend == wanted for entry in TABLE[op])
    return wanted if has_it or layer != "auto" else "auto"


def is_free() -> bool:
    """Return whether nobody asked for a backend or for the log, so that the fastest may serve."""
    return _requested.get() is None and _env.backend() == "auto" and not _env.log_dispatch()


def check_differentiable(op: str, layer: str) -> None:
    """Check the request of a call that only torch can differentiate, before the reference runs it.

    Raises:
        ValueError: the layer itself named another backend, or an unknown one.
    """
    _check_name(layer)
    if layer not in ("auto", "torch"):
        raise ValueError(
            f"backend={layer!r} can't run {op}: gradients are wanted and only torch has a backward"
        )


def choose(op: str, layer: str, *args: Any) -> Implementation:
    """Return the implementation of ``op`` that serves this call.

    Args:
        op: a key of `TABLE`.
        layer: the calling layer's own request, ``"auto"`` when it has none.
        args: the op's arguments, as its implementations take them.

    Raises:
        ValueError: a backend was named and can't serve the call; the message gives its reason.
    """
    wanted = requested_of(op, layer)
    reasons = []
    for entry in TABLE[op]:
        if wanted not in ("auto", entry.backend):
            continue
        reason = entry.why_not(*args)
        if reason is None:
            if _env.log_dispatch():
                _log.info("%s: %s", op, entry.name)
            return entry
        reasons.append(reason)
        if _env.log_dispatch():
            _log.info("%s: not %s, %s", op, entry.name, reason)
    if reasons:
        raise ValueError(f"backend={wanted!r} can't run {op}: {'; '.join(reasons)}")
    raise ValueError(f"backend={wanted!r} has no implementation of {op}")


def table() -> list[tuple[str, str, str | None]]:
    """Return (op, backend and variant, why it can't serve here or None) in order of preference."""
    return [(op, entry.name, entry.status()) for op, row in TABLE.items() for entry in row]
