"""The Triton backend: why it can or can't serve a call, and its calls of the kernels."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _env
from . import packing, reference

# Read once: Triton itself reads the variable when it is imported.
INTERPRETED = _env.triton_interpret()

# Dense matmul FLOP/s (16 bit) and bytes/s by compute capability, from the vendors' data sheets.
_RATES = {8: (312e12, 2.0e12), 9: (989e12, 3.35e12), 10: (2250e12, 8.0e12)}
# What cuBLAS reaches of the peak on large shapes, and Triton of cuBLAS by N K: 80-100 % above
# 2688² and 21-38 % below 2048² on an H100 (triton#3672).
_CUBLAS = 0.7
_TRITON = ((2688**2, 0.9), (2048**2, 0.6), (0, 0.3))
_LAUNCH = 3e-6


@functools.cache
def status() -> str | None:
    """Return why Triton kernels can't run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no GPU, and TRITON_INTERPRET=1 is not set"
    try:
        _kernels()
    except Exception as error:  # a broken installation is a reason, not a crash
        return f"finegates.kernels can't be imported: {' '.join(str(error).split())}"
    return None


@functools.cache
def _kernels() -> Any:
    """Import the kernels, and with them Triton, on first use."""

    class Kernels:
        gated = importlib.import_module("finegates.kernels.gated_matmul")
        fold = importlib.import_module("finegates.kernels.fold")
        norm = importlib.import_module("finegates.kernels.norm_gather")
        mass = importlib.import_module("finegates.kernels.open_mass")
        launch = importlib.import_module("finegates.kernels.launch")

    return Kernels


def _refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """Return why tensors like x can't go to a kernel, or None; the CPU is answered first."""
    if not x.is_cuda and not INTERPRETED:
        return f"x is on {x.device.type}, the kernels run on a GPU"
    reason = status()
    if reason is not None:
        return reason
    if x.is_cuda and torch.version.hip is None and _capability(x.device) < 8:
        return "the kernels need compute capability 8.0 or later"
    launch = _kernels().launch
    if x.dtype not in launch.DTYPES:
        return f"no kernel for {x.dtype}"
    if INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter truncates bfloat16"
    for tensor in (x, *others):
        if tensor is None:
            continue
        if tensor.device != x.device:
            return f"operands are on {x.device} and {tensor.device}"
        if max(math.prod(tensor.shape[:-1]), tensor.shape[-1]) > launch.MAX_SIZE:
            return f"a size is above {launch.MAX_SIZE}"
    return None


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` with the first tensor's GPU as the current one, where Triton launches."""

    @functools.wraps(run)
    def guarded(x: Tensor, *args: Any) -> Any:
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return run(x, *args)
        with torch.cuda.device(x.device):
            return run(x, *args)

    return guarded


def _same_dtype(x: Tensor, *others: Tensor | None) -> str | None:
    for tensor in others:
        if tensor is not None and tensor.dtype != x.dtype:
            return f"operands are {x.dtype} and {tensor.dtype}"
    return None


def _flat(t: Tensor) -> Tensor:
    """Return t as a matrix, leading dimensions merged; copied only if strides ask for it."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _output(y: Tensor | None, dy: Tensor) -> Tensor:
    """Return y as a matrix with dense rows; dy stands in for a y that isn't kept nor read."""
    return _flat(dy) if y is None else _flat(y).contiguous()


def _precision(x: Tensor) -> str:
    """Return how fp32 products are taken: as torch's own, tf32 only where the user allowed it."""
    exact = x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def why_not(
    x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None, c: Tensor | None
) -> str | None:
    """Return why `gated_linear` can't run on Triton, or None."""
    return _refusal(x, w, b, r, c) or _same_dtype(x, w, b)


@_on_its_device
def gated_linear(
    x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None, c: Tensor | None
) -> Tensor:
    """Run the fused forward with given gate values."""
    kernels = _kernels()
    y: Tensor = kernels.gated.gated_matmul_fwd(
        _flat(x), w, b, r, c, _value_gates(w, r, c), precision=_precision(x)
    )
    return y.view(*x.shape[:-1], w.shape[0])


def backward_why_not(dy: Tensor, x: Tensor, w: Tensor, b: Tensor | None, *_: Any) -> str | None:
    """Return why `gated_linear_backward` can't run on Triton, or None."""
    return _refusal(x, dy, w, b) or _same_dtype(x, dy, w, b)


@_on_its_device
def gated_linear_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    r: Tensor | None,
    c: Tensor | None,
    y: Tensor | None,
    closed_row_grad: bool,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    """Run the backward kernels with given gate values; closed columns always get their gradient."""
    grads = _fused_gradients(
        dy, x, w, b, r, c, y, _value_gates(w, r, c), None, None, mask, True, closed_row_grad
    )
    return _filled(grads, x)


def _value_gates(w: Tensor, r: Tensor | None, c: Tensor | None) -> Any:
    n, k = max(w.shape[0], 1), max(w.shape[1], 1)
    return _kernels().gated.Gates(
        row="none" if r is None else "value",
        column="none" if c is None else "value",
        row_layout=(n, n),
        column_layout=(k, k),
    )


def fused_why_not(x: Tensor, w: Tensor, *rest: Any) -> str | None:
    """Return why `gated_matmul` can't run with gates inside the GEMM, or why that is slower."""
    b, rows, columns, closed_grad = rest[0], rest[4], rest[5], rest[13]
    reason = _refusal(x, w, b) or _same_dtype(x, w, b)
    return reason or _fold_wins(x, w, rows, columns, closed_grad)[0]


def fold_why_not(x: Tensor, w: Tensor, *rest: Any) -> str | None:
    """Return why `gated_matmul` can't fold its gates into the weight, or why that is slower."""
    b, rows, columns, closed_grad = rest[0], rest[4], rest[5], rest[13]
    reason = _refusal(x, w, b) or _same_dtype(x, w, b)
    return reason or _fold_wins(x, w, rows, columns, closed_grad)[1]


def fused_backward_why_not(dy: Tensor, x: Tensor, w: Tensor, b: Any, *rest: Any) -> str | None:
    """Return why `gated_matmul_backward` can't run fused, or why that is slower."""
    reason = _refusal(x, dy, w, b) or _same_dtype(x, dy, w, b)
    return reason or _fold_wins(x, w, rest[3], rest[4], rest[14])[0]


def fold_backward_why_not(dy: Tensor, x: Tensor, w: Tensor, b: Any, *rest: Any) -> str | None:
    """Return why `gated_matmul_backward` can't run on the folded weight, or why that is slower."""
    reason = _refusal(x, dy, w, b) or _same_dtype(x, dy, w, b)
    return reason or _fold_wins(x, w, rest[3], rest[4], rest[14])[1]


def _fold_wins(
    x: Tensor, w: Tensor, rows: Tensor | None, columns: Tensor | None, closed_grad: bool
) -> tuple[str | None, str | None]:
    """Return (why not fused, why not folded): exactly one of them is None."""
    if rows is not None or columns is not None:
        return None, "the weight is compact or in another order"
    if closed_grad:
        return None, "closed gates get a gradient, which a folded weight has lost"
    device = _capability(x.device) if x.is_cuda else 9
    m = x.numel() // max(x.shape[-1], 1)
    fused, folded = estimate(m, w.shape[0], w.shape[1], x.dtype, device)
    times = f"{1e6 * fused:.1f} µs fused, {1e6 * folded:.1f} µs folded (estimate)"
    shape = f"at {m}×{w.shape[0]}×{w.shape[1]}"
    if folded < fused:
        return f"folding is faster {shape}: {times}", None
    return None, f"gates in the GEMM are faster {shape}: {times}"


def estimate(m: int, n: int, k: int, dtype: torch.dtype, capability: int) -> tuple[float, float]:
    """Return seconds of a forward GEMM with the gates inside, and with gates folded into w first.

    A GEMM takes the longer of its arithmetic and its traffic. Folding adds a launch and one read
    and one write of w; Triton's GEMM reaches less of the arithmetic peak than cuBLAS.
    """
    peak, bandwidth = _RATES.get(capability, _RATES[9])
    if dtype == torch.float32:
        peak /= 16.0
    bytes_of = dtype.itemsize
    traffic = bytes_of * (m * k + n * k + m * n) / bandwidth
    arithmetic = 2.0 * m * n * k / (peak * _CUBLAS)
    efficiency = next(share for size, share in _TRITON if n * k >= size)
    fused = max(arithmetic / efficiency, traffic)
    folded = max(arithmetic, traffic) + 2.0 * bytes_of * n * k / bandwidth + _LAUNCH
    return fused, folded


def _sampled_gates(
    row_logits: Tensor | None,
    column_logits: Tensor | None,
    seed: Tensor | None,
    row_layout: list[int],
    column_layout: list[int],
    distribution: str,
    shift: float,
    scale: float,
    beta: float,
) -> Any:
    return _kernels().gated.Gates(
        row="none" if row_logits is None else distribution,
        column="none" if column_logits is None else distribution,
        row_logits=row_logits,
        column_logits=column_logits,
        seed=None if distribution == "ranking" else seed,
        row_layout=tuple(row_layout),
        column_layout=tuple(column_layout),
        shift=shift,
        scale=scale,
        beta=beta,
    )


def _room(logits: Tensor | None, size: int) -> Tensor | None:
    return None if logits is None else logits.new_empty(size)


@_on_its_device
def gated_matmul_fused(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    row_logits: Tensor | None,
    column_logits: Tensor | None,
    seed: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    out_features: int,
    row_layout: list[int],
    column_layout: list[int],
    distribution: str,
    shift: float,
    scale: float,
    beta: float,
    closed_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample and multiply in one launch; a compact weight's gates are all open: none to sample."""
    kernels, none = _kernels(), x.new_empty(0, dtype=torch.float32)
    if reference.is_compact(rows, columns, out_features, x.shape[-1]):
        gates, r, c = kernels.gated.Gates(), None, None
    else:
        gates = _sampled_gates(
            row_logits, column_logits, seed, row_layout, column_layout, distribution, shift, scale,
            beta,
        )  # fmt: skip
        r, c = _room(row_logits, out_features), _room(column_logits, x.shape[-1])
    y = kernels.gated.gated_matmul_fwd(
        _flat(x), w, b, r, c, gates, rows, columns, out_features, precision=_precision(x)
    )
    y = y.view(*x.shape[:-1], out_features)
    return y, none if r is None else r, none.clone() if c is None else c


@_on_its_device
def gated_matmul_fold(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    row_logits: Tensor | None,
    column_logits: Tensor | None,
    seed: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    out_features: int,
    row_layout: list[int],
    column_layout: list[int],
    distribution: str,
    shift: float,
    scale: float,
    beta: float,
    closed_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample the gates into the weight in one launch, then let cuBLAS multiply."""
    none = x.new_empty(0, dtype=torch.float32)
    gates = _sampled_gates(
        row_logits, column_logits, seed, row_layout, column_layout, distribution, shift, scale, beta
    )
    r, c = _room(row_logits, out_features), _room(column_logits, x.shape[-1])
    folded, bias = _kernels().fold.fold_fwd(w, b, r, c, gates)
    y = F.linear(x, folded, bias)
    return y, none if r is None else r, none.clone() if c is None else c


@_on_its_device
def gated_matmul_backward_fused(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    row_logits: Tensor | None,
    column_logits: Tensor | None,
    noise: bool,
    rows: Tensor | None,
    columns: Tensor | None,
    y: Tensor | None,
    r: Tensor,
    c: Tensor,
    row_layout: list[int],
    column_layout: list[int],
    distribution: str,
    shift: float,
    scale: float,
    beta: float,
    closed_grad: bool,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    """Run the backward kernels: two launches with a frozen weight, three with a trained one."""
    compact = reference.is_compact(rows, columns, dy.shape[-1], x.shape[-1])
    seed = x if noise else None  # only whether there was noise matters here
    gates = _sampled_gates(
        row_logits, column_logits, seed, row_layout, column_layout, distribution, shift, scale, beta
    )
    grads = _fused_gradients(
        dy, x, w, b, _given(r, row_logits, compact), _given(c, column_logits, compact), y, gates,
        rows, columns, mask, closed_grad or compact, closed_grad,
    )  # fmt: skip
    return _filled(grads, x)


def _given(values: Tensor, logits: Tensor | None, compact: bool) -> Tensor | None:
    """Return the gate values of a side, None where all are 1."""
    return None if logits is None or compact else values


@_on_its_device
def gated_matmul_backward_fold(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    row_logits: Tensor | None,
    column_logits: Tensor | None,
    noise: bool,
    rows: Tensor | None,
    columns: Tensor | None,
    y: Tensor | None,
    r: Tensor,
    c: Tensor,
    row_layout: list[int],
    column_layout: list[int],
    distribution: str,
    shift: float,
    scale: float,
    beta: float,
    closed_grad: bool,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    """Fold again, dx = dy w', and dc = Σ x ⊙ dx / c beside dr = Σ dy ⊙ y / r for interior gates."""
    kernels = _kernels()
    row, column = _given(r, row_logits, False), _given(c, column_logits, False)
    wants_column = mask[4] and column is not None
    dy2, x2, y2 = _flat(dy), _flat(x), _output(y, dy)
    dx = dw = None
    if mask[0] or wants_column:
        folded, _ = kernels.fold.fold_fwd(w, None, row, column, _value_gates(w, row, column))
        dx = dy2 @ folded
    if mask[1]:
        g = dy2.t() @ x2
        dw, _ = kernels.fold.fold_fwd(g, None, row, column, _value_gates(w, row, column))
    wanted = (mask[3] and row is not None, wants_column, mask[2] and b is not None)
    dr, dc, db = kernels.fold.fold_bwd(dy2, y2, x2, dx, wanted)
    gates = _sampled_gates(
        row_logits, column_logits, x if noise else None, row_layout, column_layout, distribution,
        shift, scale, beta,
    )  # fmt: skip
    drow, dcolumn, dbias = kernels.gated.gated_matmul_bwd_gates(
        dr, dc, db, row, column, b, gates, divide_row=True, divide_column=True
    )
    dx = dx.view(x.shape) if dx is not None and mask[0] else None
    return _filled((dx, dw, dbias, drow, dcolumn), x)


def _fused_gradients(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    r: Tensor | None,
    c: Tensor | None,
    y: Tensor | None,
    gates: Any,
    rows: Tensor | None,
    columns: Tensor | None,
    mask: list[bool],
    closed_grad: bool,
    closed_row_grad: bool,
) -> tuple[Tensor | None, ...]:
    """dx, dw, db and both sides' gradients, by the fewest kernels that give what is wanted."""
    gated, precision = _kernels().gated, _precision(x)
    dy2, x2, y2 = _flat(dy), _flat(x), _output(y, dy)
    wants_row = mask[3] and gates.row != "none"
    wants_column = mask[4] and gates.column != "none"
    wants_bias = mask[2] and b is not None
    maps = {"rows": rows, "columns": columns}
    dx = dw = dc = dr = db = None
    if mask[1]:
        if mask[0]:
            dx, *_ = gated.gated_matmul_bwd_x(
                dy2, w, x2, y2, r, c, (True, False, False, False), **maps, precision=precision
            )
        dw, dc, dr, db = gated.gated_matmul_bwd_w(
            dy2, x2, w, b, r, c, (wants_column, wants_row, wants_bias), **maps,
            closed_grad=closed_grad, precision=precision,
        )  # fmt: skip
    else:
        dx, dc, dr, db = gated.gated_matmul_bwd_x(
            dy2, w, x2, y2, r, c, (mask[0], wants_column, wants_row, wants_bias), **maps,
            closed_grad=closed_grad, precision=precision,
        )  # fmt: skip
        if wants_row and closed_row_grad:
            gated.gated_matmul_bwd_r(x2, w, b, dy2, r, c, dr, **maps, precision=precision)
    drow, dcolumn, dbias = gated.gated_matmul_bwd_gates(
        dr, dc, db, r, c, b, gates, divide_row=not mask[1], rows=rows, closed_grad=closed_grad
    )
    return None if dx is None else dx.view(x.shape), dw, dbias, drow, dcolumn


def _filled(grads: tuple[Tensor | None, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Replace what was not wanted by empty tensors, one each: outputs of an op may not alias."""
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def pruned_why_not(x: Tensor, w: Tensor, b: Tensor | None, *rest: Any) -> str | None:
    """Return why `pruned_linear` can't run on Triton, or None."""
    return _refusal(x, w, b, *rest[:2]) or _same_dtype(x, w, b, rest[4])


@_on_its_device
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
    kernels = _kernels()
    if columns is not None:
        w, columns = _aligned(w, columns)
    y: Tensor = kernels.gated.gated_matmul_fwd(
        _flat(x), w, b, None, None, kernels.gated.Gates(), rows, columns, out_features, activation,
        None if residual is None else _flat(residual).contiguous(), _precision(x),
    )  # fmt: skip
    return y.view(*x.shape[:-1], out_features)


_aligned_weights: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _aligned(w: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return w with zero columns up to a multiple of 16, its last kept column repeated for them.

    An odd row length would leave 2-byte loads where 16-byte ones are possible. The copy is made
    once and lives as long as w; any change of w or columns makes it again.
    """
    spare = -w.shape[1] % 16
    if spare == 0 or w.shape[1] == 0 or w.is_inference() or columns.is_inference():
        return w, columns
    state = packing.state(w, None, None, columns, w.shape[0], w.shape[1])
    found = _aligned_weights.get(w)  # type: ignore[no-untyped-call]
    if found is None or found[0] != state:
        wide = F.pad(w.detach(), (0, spare))
        index = torch.cat((columns, columns[-1:].expand(spare)))
        # The aliases keep the storage alive: no other tensor can get its address.
        found = (state, (w.detach(), columns.detach()), wide, index)
        _aligned_weights[w] = found
    return found[2], found[3]


def norm_gather_why_not(x: Tensor, *rest: Any) -> str | None:
    """Return why `norm_gather` can't run on Triton, or None."""
    return _refusal(x, *rest[:3])


@_on_its_device
def norm_gather(
    x: Tensor,
    columns: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
) -> Tensor:
    """Run norm and gather in one launch."""
    y: Tensor = _kernels().norm.norm_gather_fwd(_flat(x), columns, weight, bias, eps, norm)
    return y.view(*x.shape[:-1], columns.shape[0])


def open_mass_why_not(logits: Tensor, *_: Any) -> str | None:
    """Return why `open_mass` can't run on Triton, or None."""
    return _refusal(logits) or (
        None if logits.dtype == torch.float32 else f"logits are {logits.dtype}"
    )


@_on_its_device
def open_mass(
    logits: Tensor, offsets: Tensor, distribution: str, shift: float, scale: float
) -> Tensor:
    """Run all gate vectors' sums in one launch."""
    mass: Tensor = _kernels().mass.open_mass_fwd(
        logits.contiguous(), offsets.contiguous(), distribution, shift, scale
    )
    return mass


def open_mass_backward_why_not(dout: Tensor, logits: Tensor, *_: Any) -> str | None:
    """Return why `open_mass_backward` can't run on Triton, or None."""
    return open_mass_why_not(logits)


@_on_its_device
def open_mass_backward(
    dout: Tensor, logits: Tensor, offsets: Tensor, distribution: str, shift: float, scale: float
) -> Tensor:
    """Run all gate vectors' gradients in one launch."""
    dlogits: Tensor = _kernels().mass.open_mass_bwd(
        dout.contiguous(), logits.contiguous(), offsets.contiguous(), distribution, shift, scale
    )
    return dlogits
