"""The public ops on the Triton backend, in the interpreter."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finegates import GateConfig
from finegates.gates import Gate
from finegates.ops import (
    gated_linear,
    norm_gather,
    open_mass,
    pruned_linear,
    reference,
    schema,
)
from gated_case import make
from numerics import assert_no_worse

DTYPES = [torch.float32, torch.float16]
DTYPE_IDS = ["fp32", "fp16"]
DISTRIBUTIONS = ["gaussian", "hard_concrete", "ranking"]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("closed_row_grad", [True, False])
@pytest.mark.parametrize(
    ("given", "present"),
    [
        (given, present)
        for given in ("brc", "rc", "r", "c", "b")
        for present in ("xwbrc", "xbrc", "xrc", "rc", "b", "xwrc")
        if set(present) & {*"xw", *given}
    ],
)
def test_gated_linear(given: str, present: str, closed_row_grad: bool, dtype: torch.dtype) -> None:
    """Given gate values, closed ones included: forward and every gradient that is wanted."""
    g = torch.Generator().manual_seed(0)
    m, n, k = 35, 70, 67
    shapes = {"x": (m, k), "w": (n, k), "b": (n,), "r": (n,), "c": (k,)}
    named = {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    for gate in "rc":
        named[gate] = named[gate].abs().clamp(max=1.0) * (named[gate].abs() > 0.4)
    named = {
        name: tensor.to(dtype).requires_grad_(name in present)
        for name, tensor in named.items()
        if name in "xw" or name in given
    }
    dy = torch.randn(m, n, generator=g).to(dtype)
    wanted = [name for name in named if name in present]

    def run(inputs: dict[str, Tensor], dy: Tensor, backend: str) -> list[Tensor]:
        y = gated_linear(**inputs, closed_row_grad=closed_row_grad, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, [inputs[name] for name in wanted], dy)]

    exact_inputs = {
        k: v.detach().double().requires_grad_(v.requires_grad) for k, v in named.items()
    }
    ours, plain = run(named, dy, "triton"), run(named, dy, "torch")
    exact = run(exact_inputs, dy.double(), "torch")
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_no_worse(a, b, c)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("maps", ["rows", "columns", "both", "none"])
@pytest.mark.parametrize("m", [1, 70])
def test_pruned_linear(m: int, maps: str, activation: str, dtype: torch.dtype) -> None:
    n_out, k_in = 150, 140
    rows = torch.randperm(n_out)[:90].sort().values.int()
    columns = torch.randperm(k_in)[:83].sort().values.int()
    rows_, columns_ = (
        rows if maps in ("rows", "both") else None,
        columns if maps in ("columns", "both") else None,
    )
    n = n_out if rows_ is None else 90
    k = k_in if columns_ is None else 83
    x = torch.randn(2, m, k_in).to(dtype)
    w = (torch.randn(n, k) / 9).to(dtype)
    for b, residual in (
        (torch.randn(n).to(dtype), torch.randn(2, m, n_out).to(dtype)),
        (None, None),
    ):
        args = (x, w, b, rows_, columns_, n_out)
        if columns_ is not None:
            removed_columns = torch.ones(k_in, dtype=torch.bool)
            removed_columns[columns_.long()] = False
            x[..., removed_columns] = float("nan")
        y = pruned_linear(*args, activation=activation, residual=residual, backend="triton")
        wide = [None if t is None else t.double() for t in (w, b, residual)]
        exact = reference.pruned_linear(
            x.double(), wide[0], wide[1], rows_, columns_, n_out, activation, wide[2]
        )
        assert_no_worse(y, reference.pruned_linear(*args, activation, residual), exact)
        if rows_ is not None and residual is None:
            removed = torch.ones(n_out, dtype=torch.bool)
            removed[rows_.long()] = False
            assert not y[..., removed].any()


def test_aligned_copy_follows_the_weight() -> None:
    columns = torch.tensor([0, 2, 3], dtype=torch.int32)
    x, w = torch.randn(2, 5), torch.randn(4, 3)
    for _ in range(2):
        for backend in ("triton", "torch"):
            y = pruned_linear(x, w, None, None, columns, backend=backend)
            torch.testing.assert_close(y, x[:, columns.long()] @ w.t())
        w.mul_(2.0)
        columns[2] = 4


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_pruned_linear_of_almost_nothing(kept: int) -> None:
    rows = torch.tensor([3, 60], dtype=torch.int32)[:kept]
    x, w, residual = torch.randn(5, 66), torch.randn(kept, 66), torch.randn(5, 100)
    y = pruned_linear(x, w, None, rows, None, 100, residual=residual, backend="triton")
    exact = reference.pruned_linear(x, w, None, rows, None, 100, "none", residual)
    torch.testing.assert_close(y, exact, atol=1e-5, rtol=0)
    columns = torch.tensor([5, 65], dtype=torch.int32)[:kept]
    for m in (0, 3, 70):
        x, b = torch.randn(m, 66), torch.randn(7)
        y = pruned_linear(x, torch.ones(7, kept), b, None, columns, backend="triton")
        expected = x[:, columns.long()].sum(1, keepdim=True) + b
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("k", [1100, 66, 1])
def test_norm_gather(k: int, norm: str, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 3, k) + 0.5).to(dtype)
    columns = torch.randperm(k)[: max(1, k // 2)].sort().values.int()
    for weight, bias in ((torch.rand(k).to(dtype), torch.randn(k).to(dtype)), (None, None)):
        y = norm_gather(x, columns, weight, bias, eps=1e-5, norm=norm, backend="triton")
        plain = reference.norm_gather(x, columns, weight, bias, 1e-5, norm)
        wide = [None if t is None else t.double() for t in (weight, bias)]
        exact = reference.norm_gather(x.double(), columns, *wide, 1e-5, norm)
        assert_no_worse(y, plain, exact)
    stock = {"rms": F.rms_norm, "layer": F.layer_norm}.get(norm)
    if stock is not None:
        torch.testing.assert_close(plain, stock(x, (k,), eps=1e-5)[..., columns.long()])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_open_mass(distribution: str) -> None:
    config = GateConfig(distribution=distribution)
    gates = [Gate(size, config) for size in (5, 1, 1500, 64)]
    for gate in gates:
        nn.init.normal_(gate.logits)
    shift, scale = {
        "gaussian": (config.offset, config.open_sigma),
        "hard_concrete": (config.beta * math.log(-config.gamma / config.zeta), 1.0),
        "ranking": (0.0, 1.0),
    }[distribution]
    offsets = torch.tensor([0, 5, 6, 1506, 1570])
    grads = []
    for backend in ("triton", "torch"):
        logits = torch.cat([gate.logits for gate in gates]).detach().requires_grad_()
        mass = open_mass(logits, offsets, distribution, shift, scale, backend=backend)
        expected = torch.stack([gate.open_probability().sum() for gate in gates])
        torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-6)
        mass.square().sum().backward()
        grads.append(logits.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    expected.square().sum().backward()
    if distribution != "ranking":
        plain = torch.cat([gate.logits.grad for gate in gates])
        torch.testing.assert_close(grads[0], plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_norm_gather_of_strided_and_empty_operands(norm: str) -> None:
    columns = torch.tensor([0, 3, 64], dtype=torch.int32)
    x = torch.randn(66, 2, 5).permute(2, 1, 0)
    for rows in (x, x[:0], x[..., ::1].expand(3, 5, 2, 66)):
        y = norm_gather(rows, columns, norm=norm, backend="triton")
        plain = reference.norm_gather(rows, columns, None, None, 1e-6, norm)
        torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-6)
    assert norm_gather(x, columns[:0], norm=norm, backend="triton").shape == (5, 2, 0)


def test_pruned_linear_of_strided_operands() -> None:
    rows, columns = (torch.tensor(index, dtype=torch.int32) for index in ([1, 5, 64], [0, 3, 4]))
    x, w = torch.randn(70, 3, 5).permute(1, 2, 0), torch.randn(3, 3).t()
    residual = torch.randn(66, 5, 3).permute(2, 1, 0)
    args = (x, w, torch.randn(6)[::2], rows, columns, 66)
    y = pruned_linear(*args, residual=residual, backend="triton")
    plain = reference.pruned_linear(*args, "none", residual)
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)


def test_open_mass_of_nothing() -> None:
    for offsets, size in (([0], 0), ([0, 0, 3, 3], 3)):
        logits = torch.randn(size, requires_grad=True)
        args = (logits, torch.tensor(offsets), "gaussian", 0.5, 0.5)
        mass = open_mass(*args, backend="triton")
        torch.testing.assert_close(mass, reference.open_mass(*args))
        mass.sum().backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def test_ops_without_a_layer_compile_whole() -> None:
    index = torch.tensor([0, 3, 6], dtype=torch.int32)
    w, offsets = torch.randn(3, 3), torch.tensor([0, 3, 9])

    def run(x: Tensor, logits: Tensor) -> Tensor:
        y = pruned_linear(x, w, None, index, index, 9, activation="gelu")
        mass = open_mass(logits, offsets, "gaussian", 0.5, 0.5)
        return norm_gather(y, index).sum() + mass.sum()

    x, logits = torch.randn(4, 9), torch.randn(9)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, logits), run(x, logits))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("distribution", "compact"), [*((d, False) for d in DISTRIBUTIONS), ("ranking", True)]
)
def test_opcheck(distribution: str, compact: bool) -> None:
    case = make((2, 3), 9, 7, distribution=distribution)
    if compact:
        assert case.row_logits is not None
        case.rows = torch.tensor([0, 4, 8], dtype=torch.int32)
        case.w, case.b = case.w[:3].clone(), None
    for name in ("x", "w", "b", "row_logits", "column_logits"):
        tensor = getattr(case, name)
        if tensor is not None:
            setattr(case, name, tensor.clone().requires_grad_())
    torch.library.opcheck(schema.ops.gated_matmul.default, (*case.call(), "auto"))
    with torch.no_grad():
        y, r, c = schema.ops.gated_matmul.default(*case.call(), "auto")
    args = (torch.randn_like(y), y, r, c, *case.call(), "auto", [True] * 5)
    args = tuple(t.detach() if isinstance(t, Tensor) else t for t in args)
    torch.library.opcheck(schema.ops.gated_matmul_backward.default, args)


def test_opcheck_of_the_small_ops() -> None:
    x, columns = torch.randn(2, 3, 9), torch.tensor([0, 4, 8], dtype=torch.int32)
    torch.library.opcheck(
        schema.ops.norm_gather.default, (x, columns, None, None, 1e-6, "rms", "auto")
    )
    logits = torch.randn(9, requires_grad=True)
    offsets = torch.tensor([0, 4, 9])
    torch.library.opcheck(
        schema.ops.open_mass.default, (logits, offsets, "gaussian", 0.5, 0.5, "auto")
    )
    args = (torch.randn(2), logits.detach(), offsets, "gaussian", 0.5, 0.5, "auto")
    torch.library.opcheck(schema.ops.open_mass_backward.default, args)
