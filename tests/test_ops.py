"""The ops as torch sees them: opcheck, autograd, argument checks, autocast, and the routing."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finegates.ops import gated_linear, pruned_linear, reference, schema, use_backend
from numerics import assert_no_worse

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PRESENT = list(itertools.product([False, True], repeat=3))
PRESENT_IDS = ["".join(n for n, p in zip("brc", ps, strict=True) if p) or "none" for ps in PRESENT]
SHAPES = [((), 5, 3), ((4,), 6, 5), ((2, 3), 7, 1), ((0,), 4, 3), ((17,), 129, 65)]


def operands(
    shape: tuple[int, ...],
    n: int,
    k: int,
    present: tuple[bool, bool, bool] = (True, True, True),
    dtype: torch.dtype = F64,
    grad: bool = True,
) -> dict[str, Tensor | None]:
    """Random operands; every third gate is closed, the rest lie in (0, 1]."""
    g = torch.Generator().manual_seed(n * 100 + k)
    x, w, b = (torch.randn(*s, generator=g, dtype=F64) for s in ((*shape, k), (n, k), (n,)))
    r, c = (torch.rand(size, generator=g, dtype=F64).add(0.1).clamp(max=1.0) for size in (n, k))
    r[::3], c[1::3] = 0.0, 0.0
    keep = dict(zip("brc", present, strict=True))
    named = {"x": x, "w": w, "b": b, "r": r, "c": c}
    return {
        name: t.to(dtype).requires_grad_(grad) if keep.get(name, True) else None
        for name, t in named.items()
    }


def plain(x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None, c: Tensor | None) -> Tensor:
    """The formula in plain PyTorch, differentiated by autograd alone."""
    y = F.linear(x if c is None else x * c, w, b)
    return y if r is None else y * r


@pytest.mark.parametrize("present", PRESENT, ids=PRESENT_IDS)
@pytest.mark.parametrize(("shape", "n", "k"), SHAPES[:4], ids=str)
def test_gradcheck(present: Any, shape: tuple[int, ...], n: int, k: int) -> None:
    named = operands(shape, n, k, present)
    inputs = [t for t in named.values() if t is not None]

    def op(*tensors: Tensor) -> Tensor:
        given = dict(zip([n for n, t in named.items() if t is not None], tensors, strict=True))
        return gated_linear(**given)  # type: ignore[arg-type]

    # The clamp's kink is outside: r and c themselves are the inputs, 0 is no special point.
    assert torch.autograd.gradcheck(op, inputs, fast_mode=False)


@pytest.mark.parametrize("present", PRESENT, ids=PRESENT_IDS)
@pytest.mark.parametrize("wanted", ["x", "xw", "wb", "rc", "xrc", "r", "c", "b"])
def test_gradients_equal_autograd_for_every_wanted_set(present: Any, wanted: str) -> None:
    ours = operands((2, 3), 6, 5, present, grad=False)
    theirs = operands((2, 3), 6, 5, present, grad=False)
    asked = [name for name in wanted if ours[name] is not None]
    if not asked:
        return
    for name in asked:
        ours[name].requires_grad_()  # type: ignore[union-attr]
        theirs[name].requires_grad_()  # type: ignore[union-attr]
    y, expected = gated_linear(**ours), plain(**theirs)  # type: ignore[arg-type]
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    y.backward(dy)
    expected.backward(dy)
    for name in "xwbrc":
        a, b = ours[name], theirs[name]
        if name in asked:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)  # type: ignore[union-attr]
        else:
            assert a is None or a.grad is None


def test_closed_rows_get_no_gradient_when_not_wanted() -> None:
    named: Any = operands((4,), 6, 5)
    gated_linear(**named, closed_row_grad=False).sum().backward()
    closed = named["r"] == 0
    assert (named["r"].grad[closed] == 0).all()
    assert (named["r"].grad[~closed] != 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "n", "k"), SHAPES, ids=str)
def test_output_and_gradients_are_no_worse_than_plain(
    dtype: torch.dtype, shape: tuple[int, ...], n: int, k: int
) -> None:
    ours, theirs = operands(shape, n, k, dtype=dtype), operands(shape, n, k, dtype=dtype)
    exact = {name: t.detach().double().requires_grad_() for name, t in ours.items()}  # type: ignore[union-attr]
    results = [gated_linear(**ours), plain(**theirs), plain(**exact)]  # type: ignore[arg-type]
    assert_no_worse(*results)
    dy = torch.randn(results[0].shape).to(dtype)
    for y in results:
        y.backward(dy.to(y.dtype))
    for name in "xwbrc":
        assert_no_worse(ours[name].grad, theirs[name].grad, exact[name].grad)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize(("n", "k"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("present", PRESENT, ids=PRESENT_IDS)
def test_layers_without_features_have_gradients(present: Any, n: int, k: int) -> None:
    named, twin = operands((4,), n, k, present), operands((4,), n, k, present)
    y, expected = gated_linear(**named), plain(**twin)  # type: ignore[arg-type]
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    for name in "xwbrc":
        a, b = named[name], twin[name]
        if a is not None and b is not None:
            assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_gate_close_to_zero_keeps_its_gradient() -> None:
    """dr divides y by r: right down to the smallest value an fp32 gate takes, 2⁻²⁴."""
    named: Any = operands((64,), 3, 5, dtype=F32, grad=False)
    named["r"] = torch.tensor([2.0**-24, 1.0, 0.5], requires_grad=True)
    exact = {n: t.detach().double() for n, t in named.items()}
    exact["r"].requires_grad_()
    theirs = {n: t.detach().clone() for n, t in named.items()}
    theirs["r"].requires_grad_()
    for function, operand in ((gated_linear, named), (plain, theirs), (plain, exact)):
        function(**operand).sum().backward()
    assert_no_worse(named["r"].grad, theirs["r"].grad, exact["r"].grad)


@pytest.mark.parametrize("present", PRESENT, ids=PRESENT_IDS)
def test_nothing_but_operands_and_output_is_saved(present: Any) -> None:
    """Neither the gated input nor the pre-gate output is kept for the backward."""
    named = operands((2, 3), 6, 5, present)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = gated_linear(**named)  # type: ignore[arg-type]
    known = {t.data_ptr() for t in (*named.values(), y) if t is not None}
    assert saved
    assert set(saved) <= known


@pytest.mark.parametrize("gate", ["none", "frozen"])
def test_output_may_change_in_place_where_the_row_gate_gets_no_gradient(gate: str) -> None:
    ours, theirs = operands((4,), 6, 5), operands((4,), 6, 5)
    for named in (ours, theirs):
        if gate == "none":
            named["r"] = None
        else:
            named["r"].requires_grad_(False)  # type: ignore[union-attr]
    gated_linear(**ours).relu_().sum().backward()  # type: ignore[arg-type]
    plain(**theirs).relu().sum().backward()  # type: ignore[arg-type]
    for name in "xwbc":
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)  # type: ignore[union-attr]


def test_transforms_take_the_reference() -> None:
    """The op has neither a batching nor a forward-mode rule."""
    named: Any = operands((4,), 6, 5, grad=False)
    tangents = {name: torch.randn_like(t) for name, t in named.items()}

    def ours(*tensors: Tensor) -> Tensor:
        return gated_linear(*tensors)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own use of torch.jit
        pair = [
            torch.func.jvp(function, tuple(named.values()), tuple(tangents.values()))
            for function in (ours, plain)
        ]
    torch.testing.assert_close(*pair)
    rows = torch.vmap(ours, in_dims=(0, None, None, None, None))(*named.values())
    torch.testing.assert_close(rows, plain(**named))
    jacobians = [
        torch.func.jacrev(function, argnums=(0, 1, 2, 3, 4))(*named.values())
        for function in (ours, plain)
    ]
    torch.testing.assert_close(*jacobians)
    with pytest.raises(ValueError, match="backend='triton' can't run gated_linear: grad"):
        torch.vmap(lambda x: gated_linear(x, named["w"], backend="triton"))(named["x"])


def test_saved_output_may_not_be_changed_unseen() -> None:
    named: Any = operands((4,), 6, 5)
    y = gated_linear(**named)
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_are_refused() -> None:
    named: Any = operands((3,), 4, 5)
    y = gated_linear(**named)
    (dx,) = torch.autograd.grad(y.square().sum(), named["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.square().sum().backward()


@pytest.mark.parametrize("name", ["x", "w", "b", "r", "c"])
@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded"])
def test_non_contiguous_operands_just_work(name: str, view: str) -> None:
    named: Any = operands((4, 3), 6, 5, grad=False)
    t = named[name]
    named[name] = {
        "transposed": t.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": torch.stack([t, t.neg()], -1)[..., 0],
        "expanded": t[:1].expand_as(t),
    }[view]
    dense = {n: v.clone(memory_format=torch.contiguous_format) for n, v in named.items()}
    for tensors in (named, dense):
        for n, v in tensors.items():
            tensors[n] = v.requires_grad_()
    y, expected = gated_linear(**named), plain(**dense)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    dy = torch.randn(3, 4, 6, dtype=F64).transpose(0, 1)
    y.backward(dy)
    expected.backward(dy)
    for n in "xwbrc":
        torch.testing.assert_close(named[n].grad, dense[n].grad, rtol=1e-10, atol=1e-12)


def pruned_operands(dtype: torch.dtype = F32) -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    x, w, b, residual = (torch.randn(*s, generator=g) for s in ((2, 3, 9), (4, 5), (4,), (2, 3, 7)))
    return {
        "x": x.to(dtype),
        "w": w.to(dtype),
        "b": b.to(dtype),
        "rows": torch.tensor([0, 2, 3, 6], dtype=torch.int32),
        "columns": torch.tensor([1, 2, 5, 7, 8], dtype=torch.int32),
        "out_features": 7,
        "residual": residual.to(dtype),
    }


@pytest.mark.parametrize("present", PRESENT, ids=PRESENT_IDS)
@pytest.mark.parametrize("shape", [(4,), (2, 3), (0,)], ids=str)
def test_opcheck_gated_linear(present: Any, shape: tuple[int, ...]) -> None:
    named = operands(shape, 6, 5, present, dtype=F32)
    torch.library.opcheck(schema.ops.gated_linear.default, (*named.values(), True, "auto"))


@pytest.mark.parametrize("mask", [[True] * 5, [True, False] * 2 + [True], [False] * 5], ids=str)
def test_opcheck_gated_linear_backward(mask: list[bool]) -> None:
    named = operands((2, 3), 6, 5, dtype=F32, grad=False)
    y = reference.gated_linear(**named)  # type: ignore[arg-type]
    args = (torch.randn_like(y), *named.values(), y, True, mask)
    torch.library.opcheck(schema.ops.gated_linear_backward.default, args)
    grads = schema.ops.gated_linear_backward.default(*args)
    addresses = [g.untyped_storage()._cdata for g in grads]
    assert len(set(addresses)) == 5, "outputs of an op may not share memory"


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_opcheck_pruned_linear(activation: str, backend: str) -> None:
    named = pruned_operands()
    x, w, b, rows, columns, n, residual = named.values()
    for args in (
        (x, w, b, rows, columns, n, activation, residual, backend),
        (x, w, None, rows, columns, n, activation, None, backend),
        (x[..., :5], w, b, None, None, 4, activation, None, backend),
    ):
        torch.library.opcheck(schema.ops.pruned_linear.default, args)


def test_pruned_linear_gradients_are_not_lost_on_any_backend() -> None:
    """The native op has no autograd: with gradients wanted the reference must serve."""
    for wanted in ("x", "w", "b", "residual"):
        named = pruned_operands(F64)
        named[wanted] = named[wanted].requires_grad_()
        y = pruned_linear(**named)
        y.square().sum().backward()
        twin = pruned_operands(F64)
        twin[wanted] = twin[wanted].requires_grad_()
        reference.pruned_linear(**twin).square().sum().backward()
        assert named[wanted].grad is not None
        assert (named[wanted].grad != 0).any()
        assert torch.equal(named[wanted].grad, twin[wanted].grad)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_pruned_linear_without_gradients_is_no_worse_than_plain(
    dtype: torch.dtype, backend: str
) -> None:
    named = pruned_operands(dtype)
    exact = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in named.items()
    }
    with torch.no_grad(), use_backend(backend):
        y = pruned_linear(**named)
    assert_no_worse(y, reference.pruned_linear(**named), reference.pruned_linear(**exact))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 6, dtype=F64)}, r"x must have a last dimension of 5, got.*\(4, 6\)"),
        ({"x": torch.zeros((), dtype=F64)}, r"x must have a last dimension of 5, got.*\(\)"),
        ({"x": torch.zeros(4, 5)}, r"x must have w's dtype torch.float64, got torch.float32"),
        ({"x": torch.zeros(4, 5, dtype=F64, device="meta")}, "x must be on w's device cpu, got me"),
        ({"w": torch.zeros(6, dtype=F64)}, r"w must have 2 dimensions, got shape \(6,\)"),
        ({"w": torch.zeros((), dtype=F64)}, r"w must have 2 dimensions, got shape \(\)"),
        ({"b": torch.zeros(5, dtype=F64)}, r"b must have shape \(6,\), got \(5,\)"),
        ({"b": torch.zeros(6)}, r"b must have w's dtype torch.float64, got torch.float32"),
        ({"b": torch.zeros(6, dtype=F64, device="meta")}, "b must be on w's device cpu, got meta"),
        ({"r": torch.zeros(7, dtype=F64)}, r"r must have shape \(6,\), got \(7,\)"),
        ({"r": torch.zeros(6, device="meta")}, "r must be on w's device cpu, got meta"),
        ({"c": torch.zeros(6, 1, dtype=F64)}, r"c must have shape \(5,\), got \(6, 1\)"),
        ({"c": torch.zeros(5, device="meta")}, "c must be on w's device cpu, got meta"),
        ({"backend": "native"}, "backend='native' has no implementation of gated_linear"),
        ({"backend": "triton"}, "backend='triton' can't run gated_linear: "),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_gated_linear_refuses(change: dict[str, Any], message: str) -> None:
    named = {**operands((4,), 6, 5, grad=False), **change}
    with pytest.raises(ValueError, match=message) as error:
        gated_linear(**named)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 9, dtype=BF16)}, "x must have w's dtype torch.float32, got torch.bf"),
        ({"x": torch.zeros(2, 9, device="meta")}, "x must be on w's device cpu, got meta"),
        ({"x": torch.zeros(2, 4), "columns": None}, "x must have a last dimension of 5, got"),
        ({"w": torch.zeros(4)}, r"w must have 2 dimensions, got shape \(4,\)"),
        ({"b": torch.zeros(7)}, r"b must have shape \(4,\), got \(7,\)"),
        ({"rows": torch.arange(5)}, r"rows must have shape \(4,\), got \(5,\)"),
        ({"columns": torch.arange(4)}, r"columns must have shape \(5,\), got \(4,\)"),
        ({"out_features": 3}, "out_features must fit w's 4 rows, got 3"),
        ({"rows": None}, "out_features must fit w's 4 rows, got 7"),
        ({"activation": "tanh"}, "activation must be one of .*, got 'tanh'"),
        ({"residual": torch.zeros(2, 3, 4)}, r"residual must have shape \(2, 3, 7\), got"),
        ({"residual": torch.zeros(2, 3, 7, dtype=BF16)}, "residual must have x's dtype torch.floa"),
        ({"residual": torch.zeros(2, 3, 7, device="meta")}, "residual must be on x's device cpu, "),
        ({"backend": "cuda"}, "backend must be one of .*, got 'cuda'"),
        ({"backend": "triton"}, "backend='triton' can't run pruned_linear: "),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
def test_pruned_linear_refuses(change: dict[str, Any], message: str, grad: bool) -> None:
    named = {**pruned_operands(), **change}
    if grad:
        named["w"] = named["w"].requires_grad_()
    with pytest.raises(ValueError, match=message) as error:
        pruned_linear(**named)
    assert "\n" not in str(error.value)


class TestAutocast:
    """Both functions under autocast behave as ``F.linear`` does."""

    def test_gated_linear_computes_in_bf16(self) -> None:
        named: Any = operands((8,), 6, 5, dtype=F32)
        twin: Any = operands((8,), 6, 5, dtype=F32)
        exact = {n: t.detach().double().requires_grad_() for n, t in named.items()}
        with torch.autocast("cpu", BF16):
            y = gated_linear(**named)
        expected = plain(**{n: t.to(BF16) for n, t in twin.items()})
        truth = plain(**exact)
        assert y.dtype == BF16
        assert_no_worse(y, expected, truth)
        dy = torch.randn(8, 6)
        for result in (y, expected, truth):
            result.backward(dy.to(result.dtype))
        for name in "xwbrc":
            assert named[name].grad.dtype == F32
            assert_no_worse(named[name].grad, twin[name].grad, exact[name].grad)

    @pytest.mark.parametrize("dtype", [F64, BF16, F16])
    def test_same_dtype_as_f_linear(self, dtype: torch.dtype) -> None:
        x, w = torch.ones(2, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype)
        with torch.autocast("cpu", BF16):
            assert gated_linear(x, w).dtype == F.linear(x, w).dtype
            with torch.no_grad():
                assert pruned_linear(x, w).dtype == F.linear(x, w).dtype

    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("dtype", [F32, BF16])
    def test_pruned_linear_takes_mixed_dtypes(self, grad: bool, dtype: torch.dtype) -> None:
        """Inside a model x may be bf16 already while the weight is fp32."""
        named = pruned_operands()
        named["x"] = named["x"].to(dtype)
        exact = {
            n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for n, v in named.items()
        }
        named["w"].requires_grad_(grad)
        with torch.autocast("cpu", BF16):
            y = pruned_linear(**named)
        low = {n: v.to(BF16) if n in ("x", "w", "b", "residual") else v for n, v in named.items()}
        assert y.dtype == BF16
        assert_no_worse(y, reference.pruned_linear(**low), reference.pruned_linear(**exact))


def test_meta_tensors_run_without_memory() -> None:
    x, w = torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta")
    assert gated_linear(x, w, r=torch.empty(4, device="meta")).shape == (2, 4)
    assert pruned_linear(x, w).shape == (2, 4)
