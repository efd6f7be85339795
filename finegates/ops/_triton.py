"""The Triton backend: why it can or can't serve a call; pruned Linears, norms and the penalty."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _env
from . import packing
from .gated_call import GatedCall
from .index_map import check_index_map

# Read once: Triton itself reads the variable when it is imported.
INTERPRETED = _env.triton_interpret()


@functools.cache
def status() -> str | None:
    """Return why Triton kernels can't run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not INTERPRETED:
        if not torch.cuda.is_available():
            return "no GPU, and TRITON_INTERPRET=1 is not set"
        refused = [too_old(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
        if all(refused):
            return refused[0]
    try:
        kernels()
    except Exception as error:  # a broken installation is a reason, not a crash
        return f"finegates.kernels can't be imported: {' '.join(str(error).split())}"
    return None


@functools.cache
def kernels() -> Any:
    """Import the kernels, and with them Triton, on first use."""
    from ..kernels import (
        costs,
        fold,
        gated_matmul,
        gated_matmul_bwd,
        launch,
        norm_gather,
        open_mass,
        operands,
    )

    return SimpleNamespace(
        fwd=gated_matmul,
        bwd=gated_matmul_bwd,
        fold=fold,
        norm=norm_gather,
        mass=open_mass,
        launch=launch,
        costs=costs,
        operands=operands,
    )


def refusal(x: Tensor, *others: Tensor | None, out_features: int = 0) -> str | None:
    """Return why tensors like x can't go to a kernel, or None; the CPU is answered first.

    ``out_features`` are those of the result where no operand has them.
    """
    if not x.is_cuda and not INTERPRETED:
        return f"x is on {x.device.type}, the kernels run on a GPU"
    reason = status()
    if reason is not None:
        return reason
    reason = too_old(x.device) if x.is_cuda else None
    if reason is not None:
        return reason
    launch = kernels().launch
    if x.dtype not in launch.DTYPES:
        return f"no kernel for {x.dtype}"
    if INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter truncates bfloat16"
    for tensor in (x, *others):
        if tensor is None:
            continue
        if tensor.device != x.device:
            return f"operands are on {x.device} and {tensor.device}"
        sizes = (math.prod(tensor.shape[:-1]), tensor.shape[-1], out_features)
        if max(sizes) > launch.MAX_SIZE:
            return f"a size is above {launch.MAX_SIZE}"
        # An index of the last dimension and its stride are multiplied in 32 bits.
        if tensor.shape[-1] * tensor.stride(-1) > launch.MAX_SIZE:
            return f"the last dimension spans more than {launch.MAX_SIZE} elements"
    return None


@functools.cache
def too_old(device: torch.device) -> str | None:
    """Return that a GPU is none that the kernels are compiled for, or None.

    Below compute capability 8.0 there is no bf16 arithmetic and no asynchronous copy.
    """
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {major}.{minor}, the kernels need 8.0"


def alignment(device: torch.device) -> int:
    """Return the multiple that kept counts should be on a device: 1 where no kernel here serves it.

    A GPU loads 16 bytes at a time from rows of such a length, and one element from others.
    """
    serves = (device.type == "cuda" or INTERPRETED) and status() is None
    multiple: int = kernels().launch.ALIGN if serves else 1
    return multiple


def on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` with the first argument's GPU as the current one, where Triton launches."""

    @functools.wraps(run)
    def guarded(first: Tensor | GatedCall, *args: Any) -> Any:
        x = first.x if isinstance(first, GatedCall) else first
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return run(first, *args)
        with torch.cuda.device(x.device):
            return run(first, *args)

    return guarded


def same_dtype(x: Tensor, *others: Tensor | None) -> str | None:
    """Return that an operand has another dtype than x, or None."""
    for tensor in others:
        if tensor is not None and tensor.dtype != x.dtype:
            return f"operands are {x.dtype} and {tensor.dtype}"
    return None


def flat(t: Tensor) -> Tensor:
    """Return t as a matrix, leading dimensions merged; copied only if strides ask for it."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def dense(t: Tensor | None) -> Tensor | None:
    """Return a vector whose elements lie side by side: the kernels take no strides of vectors."""
    return None if t is None else t.contiguous()


def precision(x: Tensor) -> str:
    """Return how fp32 products are taken: as torch's own, tf32 only where the user allowed it.

    The older of torch's two settings raises once the newer one (torch 2.9) has been used.
    """
    if x.dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    allowed = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if allowed is None:
        allowed = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if allowed == "tf32" else "ieee"


def pruned_why_not(x: Tensor, w: Tensor, b: Tensor | None, *rest: Any) -> str | None:
    """Return why `pruned_linear` can't run on Triton, or None."""
    rows, columns, out_features, _, residual = rest
    reason = refusal(x, w, b, rows, columns, out_features=out_features)
    return reason or same_dtype(x, w, b, residual)


@on_its_device
def pruned_linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    out_features: int,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """Run gather, GEMM, bias, activation, residual and scatter in one launch (two for M > 64)."""
    operands = kernels().operands
    for name, index, size in (("rows", rows, out_features), ("columns", columns, x.shape[-1])):
        if index is not None:
            check_index_map(name, index, size, x.device)
    if columns is not None:
        w, columns = _aligned(w, columns)
    y: Tensor = kernels().fwd.gated_matmul_fwd(
        flat(x),
        operands.Weight(w, dense(b), dense(rows), dense(columns), precision(x)),
        operands.Gates(),
        out_features,
        activation,
        None if residual is None else flat(residual).contiguous(),
    )
    return y.view(*x.shape[:-1], out_features)


_aligned_weights: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _aligned(w: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return w with zero columns up to the `alignment`, its last kept column repeated for them.

    An odd row length would leave 2-byte loads where 16-byte ones are possible. The copy is made
    once and lives as long as w; any change of w or columns makes it again. One that is made while a
    CUDA graph is captured is the graph's own: it has no values before the first replay.
    """
    spare = -w.shape[1] % kernels().launch.ALIGN
    if spare == 0 or w.shape[1] == 0 or w.is_inference() or columns.is_inference():
        return w, columns
    state = packing.state(w, None, None, columns, w.shape[0], w.shape[1])
    found = _aligned_weights.get(w)  # type: ignore[no-untyped-call]
    if found is None or found[0] != state:
        wide = F.pad(w.detach(), (0, spare))
        index = torch.cat((columns, columns[-1:].expand(spare)))
        # The aliases keep the storage alive: no other tensor can get its address.
        found = (state, (w.detach(), columns.detach()), wide, index)
        if not (w.is_cuda and torch.cuda.is_current_stream_capturing()):
            _aligned_weights[w] = found
    return found[2], found[3]


def norm_gather_why_not(x: Tensor, *rest: Any) -> str | None:
    """Return why `norm_gather` can't run on Triton, or None."""
    return refusal(x, *rest[:3])


@on_its_device
def norm_gather(
    x: Tensor,
    columns: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
) -> Tensor:
    """Run norm and gather in one launch."""
    y: Tensor = kernels().norm.norm_gather_fwd(
        flat(x), columns.contiguous(), dense(weight), dense(bias), eps, norm
    )
    return y.view(*x.shape[:-1], columns.shape[0])


def open_mass_why_not(logits: Tensor, *_: Any) -> str | None:
    """Return why `open_mass` can't run on Triton, or None."""
    return refusal(logits) or (
        None if logits.dtype == torch.float32 else f"logits are {logits.dtype}"
    )


@on_its_device
def open_mass(
    logits: Tensor, offsets: Tensor, distribution: str, shift: float, scale: float
) -> Tensor:
    """Run all gate vectors' sums in one launch."""
    mass: Tensor = kernels().mass.open_mass_fwd(
        logits.contiguous(), offsets.contiguous(), distribution, shift, scale
    )
    return mass


def open_mass_backward_why_not(dout: Tensor, logits: Tensor, *_: Any) -> str | None:
    """Return why `open_mass_backward` can't run on Triton, or None."""
    return open_mass_why_not(logits)


@on_its_device
def open_mass_backward(
    dout: Tensor, logits: Tensor, offsets: Tensor, distribution: str, shift: float, scale: float
) -> Tensor:
    """Run all gate vectors' gradients in one launch."""
    dlogits: Tensor = kernels().mass.open_mass_bwd(
        dout.contiguous(), logits.contiguous(), offsets.contiguous(), distribution, shift, scale
    )
    return dlogits
