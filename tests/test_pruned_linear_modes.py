"""`PrunedLinear` under gradients, transforms, tracing, compilation and autocast."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from finegates.ops import reference
from numerics import assert_no_worse
from pruned_case import BACKENDS, COLUMNS, ROWS, asking, example, op_of, reference_of


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_flow_whatever_the_backend(backend: str) -> None:
    """A native op without autograd would lose gradients silently."""
    dense, pruned = example()
    x, twin = (torch.randn(5, 9, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    x.requires_grad_()
    twin.requires_grad_()
    with asking(backend):
        y = pruned(x)
        y.square().sum().backward()
        frozen = copy.deepcopy(pruned).requires_grad_(False)
        frozen.zero_grad()
        (dx,) = torch.autograd.grad(frozen(x).square().sum(), x)
    dense(twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(dx, twin.grad)
    rows, columns = ROWS[:, None], COLUMNS
    torch.testing.assert_close(pruned.weight.grad, dense.weight.grad[rows, columns])  # type: ignore[index]
    torch.testing.assert_close(pruned.bias.grad, dense.bias.grad[ROWS])  # type: ignore[union-attr]


def test_forward_of_every_kind_of_tracing_and_transform() -> None:
    """Where the short way would miss something, the op or the reference has to answer."""
    _, pruned = example()
    x, t = torch.randn(3, 9), torch.randn(3, 9)
    slope = reference.pruned_linear(t, pruned.weight, None, pruned.rows, pruned.columns, 7)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own use of torch.jit
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of the shape check
        expected = pruned(x)
        torch.testing.assert_close(pruned(torch._neg_view(-x)), expected)
        for function in (pruned, lambda x: op_of(pruned, x)):
            torch.testing.assert_close(torch.vmap(function)(x), expected)
            y, tangent = torch.func.jvp(function, (x,), (t,))
            torch.testing.assert_close((y, tangent), (expected, slope))
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, t)))
            torch.testing.assert_close((dual.primal, dual.tangent), (expected, slope))
        traced = torch.jit.trace(pruned, x)
        torch.testing.assert_close(traced(t), reference_of(pruned, t))


def test_batched_and_differentiated_weights() -> None:
    _, pruned = example()
    x = torch.randn(3, 9)
    parameters = dict(pruned.named_parameters())
    with torch.no_grad():
        pruned(x)

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(pruned, parameters, (x,)).square().sum()

        two = {name: torch.stack([p, 2.0 * p]) for name, p in parameters.items()}
        torch.testing.assert_close(torch.vmap(loss)(two)[1], 4.0 * loss(parameters))
        gradients = torch.func.grad(loss)(parameters)
    pruned(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("names", [["weight"], ["bias"], ["weight", "bias"]], ids=str)
def test_parametrized(names: list[str]) -> None:
    class Double(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return 2.0 * t

    _, pruned = example()
    x = torch.randn(3, 9)
    with torch.no_grad():
        pruned(x)
        for name in names:
            parametrize.register_parametrization(pruned, name, Double())
        torch.testing.assert_close(pruned(x), reference_of(pruned, x))
        assert pruned.double()(x.double()).dtype == torch.float64
    assert "kept_rows=4" in repr(pruned)


@pytest.mark.parametrize("backend", ["native", "triton", "typo"])
def test_a_layers_backend_is_never_ignored(backend: str) -> None:
    """A layer that names a backend without a backward can't train; a context's wish gives way."""
    _, pruned = example()
    pruned.backend = backend
    message = "backend must be one of" if backend == "typo" else "gradients are wanted and only"
    with pytest.raises(ValueError, match=message):
        pruned(torch.randn(3, 9))
    pruned.backend = "torch"
    pruned(torch.randn(3, 9)).sum().backward()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(grad: bool, backend: str) -> None:
    dense, pruned = example()
    torch.compiler.reset()
    fast = torch.compile(pruned, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad), asking(backend):
        for shape in ((5, 9), (2, 3, 9)):
            x = torch.randn(shape)
            torch.testing.assert_close(fast(x), dense(x))
        # A compiled layer sees a changed weight too.
        with torch.no_grad():
            pruned.weight.neg_()
        torch.testing.assert_close(fast(x), reference_of(pruned, x))
    torch.compiler.reset()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_autocast_bf16(grad: bool) -> None:
    dense, pruned = example()
    x = torch.randn(33, 9)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        y, plain = pruned(x), dense(x)
    assert y.dtype == torch.bfloat16
    exact = F.linear(x.double(), dense.weight.double(), dense.bias.double())
    assert_no_worse(y, plain, exact)
