"""The GPU's ops on their PyTorch reference: gates sampled in the op, norm + gather, open mass."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finegates import FusedGatedLinear, Gate, GateConfig, gate_
from finegates.ops import gated_matmul, norm_gather, open_mass, reference, schema
from finegates.ops.dispatch import TABLE
from gated_case import Case, make
from numerics import assert_no_worse
from tiny_models import build, scatter_gates_

ALL = ("ranking", "gaussian", "hard_concrete")
ops = schema.ops


def call(case: Case, **changes: Any) -> Tensor:
    config = case.config
    arguments: dict[str, Any] = {
        "x": case.x, "w": case.w, "b": case.b, "row_logits": case.row_logits,
        "column_logits": case.column_logits, "seed": case.seed,
        "distribution": config.distribution, "constants": config.constants,
        "rows": case.rows, "columns": case.columns,
        "out_features": case.size[0], "closed_grad": case.closed_grad,
    }  # fmt: skip
    return gated_matmul(**{**arguments, **changes})


@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("layout", [None, (2, 3, 2, 5), (4, 1, 1, 3)], ids=str)
def test_gates_are_those_of_the_module(distribution: str, noise: bool, layout: Any) -> None:
    """The op's gates are the module's, and its gradient from values alone is autograd's."""
    config = GateConfig(distribution=distribution, init_std=1.0)
    size = 60 if layout is None else layout[0] * layout[1] * layout[2] * layout[3]
    gate = Gate(size, config, layout).train(noise)
    torch.manual_seed(5)
    z = gate()
    torch.manual_seed(5)
    seed = torch.randint(0, 2**31 - 1, (1,)) if noise and distribution != "ranking" else None
    constants = (distribution, *config.constants)
    ours = reference.gate(gate.logits.detach(), seed, list(gate.span_width), size, *constants)
    torch.testing.assert_close(ours, z.detach(), rtol=0, atol=2e-6)
    assert torch.equal(ours == 0, z == 0)
    dz = torch.randn(size)
    (expected,) = torch.autograd.grad(z, gate.logits, dz)
    gradient = reference.gate_logit_gradient(
        dz, z.detach(), gate.logits.detach(), seed is not None, list(gate.span_width), *constants,
        True,
    )  # fmt: skip
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("sides", ["rc", "r", "c", ""])
@pytest.mark.parametrize("shape", [(4,), (2, 3), (), (0,)], ids=str)
def test_output_and_gradients_are_the_definition(
    distribution: str, sides: str, shape: tuple[int, ...]
) -> None:
    case = make(
        shape, 9, 7, distribution=distribution, sides=sides, closed_grad=distribution == "ranking"
    )
    leaves = {
        n: t
        for n in ("x", "w", "b", "row_logits", "column_logits")
        if (t := getattr(case, n)) is not None
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = call(case)
    _, r, c = ops.gated_matmul.default(*case.call(), "auto")
    assert not r.requires_grad
    assert not c.requires_grad
    dy = torch.randn(y.shape)
    y.backward(dy)
    exact, grads = case.exact(dy, r.detach(), c.detach())
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    for (name, leaf), expected in zip(
        ((n, leaves.get(n)) for n in ("x", "w", "b", "row_logits", "column_logits")),
        grads,
        strict=True,
    ):
        if leaf is not None:
            assert expected is not None
            torch.testing.assert_close(
                leaf.grad.double(),
                expected,
                rtol=1e-4,
                atol=1e-4,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def compact_case() -> Case:
    """Ranking gates with the compact weight of the open ones."""
    case = make((5,), 9, 7, distribution="ranking")
    rows = (case.row_logits > 0).nonzero().squeeze(1)
    columns = (case.column_logits > 0).nonzero().squeeze(1)
    assert 0 < len(rows) < 9
    assert 0 < len(columns) < 7
    case.w, case.b = case.w[rows][:, columns].contiguous(), case.b[rows].contiguous()
    case.rows, case.columns = rows.int(), columns.int()
    return case


def test_compact_weight_is_the_masked_layer() -> None:
    case, dense = compact_case(), make((5,), 9, 7, distribution="ranking")
    for one in (case, dense):
        for name in ("x", "w", "b", "row_logits", "column_logits"):
            getattr(one, name).requires_grad_()
    y, expected = call(case), call(dense, rows=None, columns=None)
    torch.testing.assert_close(y, expected)
    dy = torch.randn(5, 9)
    y.backward(dy)
    expected.backward(dy)
    for name in ("x", "row_logits", "column_logits"):
        torch.testing.assert_close(getattr(case, name).grad, getattr(dense, name).grad)
    rows, columns = case.rows.long(), case.columns.long()
    torch.testing.assert_close(case.w.grad, dense.w.grad[rows[:, None], columns])
    torch.testing.assert_close(case.b.grad, dense.b.grad[rows])


@pytest.mark.parametrize("distribution", ALL)
def test_the_layers_two_paths_agree(distribution: str) -> None:
    """`FusedGatedLinear` on the CPU and the way it takes on a GPU, evaluated here."""
    layer = FusedGatedLinear(
        7, 9, config=GateConfig(distribution=distribution, init_std=1.0)
    ).eval()
    x = torch.randn(4, 7)
    torch.testing.assert_close(layer._sample_in_kernel(x, None), layer(x))
    grads = [
        torch.autograd.grad(y.sin().sum(), list(layer.parameters()))
        for y in (layer(x), layer._sample_in_kernel(x, None))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_the_two_paths_agree_on_tied_units(model_type: str) -> None:
    """Grouped queries and rotary pairs: the layouts that `gate_` gives to rows and columns."""
    model = gate_(build(model_type, layers=1), GateConfig(distribution="gaussian"))
    scatter_gates_(model, 0.6)
    layers = [m for m in model.modules() if isinstance(m, FusedGatedLinear)]
    if model_type == "llama":
        assert any(layer.column_gate.layout for layer in layers if layer.column_gate)
        assert any(layer.row_gate.layout for layer in layers if layer.row_gate)
    for layer in layers:
        x = torch.randn(4, layer.in_features)
        torch.testing.assert_close(layer._sample_in_kernel(x, None), layer(x))


@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
@pytest.mark.parametrize("sides", ["rc", "r", "c", ""])
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("mapped", [False, True])
def test_gradcheck_gated_matmul(distribution: str, sides: str, noise: bool, mapped: bool) -> None:
    """The reference is its own derivative's judge, in fp64 and for the samples of one seed."""
    case = make((2, 3), 6, 5, torch.float64, distribution, sides=sides, noise=noise)
    if mapped:
        case.rows, case.columns = (torch.tensor(side).int() for side in ([4, 0, 5], [2, 4, 1, 0]))
        case.w, case.b = case.w[case.rows][:, case.columns], case.b[case.rows]
    call = case.call()
    leaves = [t if t is None else t.double().requires_grad_() for t in call[:5]]
    present = [i for i, leaf in enumerate(leaves) if leaf is not None]

    def op(*tensors: Tensor) -> Tensor:
        operands = dict(zip(present, tensors, strict=True))
        args = [operands.get(i, value) for i, value in enumerate(call)]
        y: Tensor = ops.gated_matmul.default(*args, "torch")[0]
        return y

    assert torch.autograd.gradcheck(op, [leaves[i] for i in present])


@pytest.mark.parametrize("distribution", ["gaussian", "hard_concrete"])
def test_gradcheck_open_mass(distribution: str) -> None:
    config = GateConfig(distribution=distribution)
    logits = torch.randn(18, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 5, 6, 18])

    def op(logits: Tensor) -> Tensor:
        return open_mass(logits, offsets, distribution, *config.open_constants, backend="torch")

    assert torch.autograd.gradcheck(op, logits)


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_gradcheck_norm_gather(norm: str) -> None:
    shapes = ((3, 7), (7,), (7,))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    columns = torch.tensor([1, 2, 5]).int()

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm_gather(x, columns, weight, bias, norm=norm)

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("sides", ["rc", "r", "c", ""])
def test_opcheck_gated_matmul(distribution: str, sides: str) -> None:
    case = make((2, 3), 9, 7, distribution=distribution, sides=sides)
    args = case.call()
    for tensor in args[:5]:
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(ops.gated_matmul.default, (*args, "auto"))


@pytest.mark.parametrize("distribution", ALL)
@pytest.mark.parametrize("mask", [[True] * 5, [False, True] * 2 + [False], [False] * 5], ids=str)
def test_opcheck_gated_matmul_backward(distribution: str, mask: list[bool]) -> None:
    case = make((2, 3), 9, 7, distribution=distribution)
    y, r, c = ops.gated_matmul.default(*case.call(), "auto")
    args = (torch.randn_like(y), y, r, c, *case.call(), "auto", mask)
    torch.library.opcheck(ops.gated_matmul_backward.default, args)
    grads = ops.gated_matmul_backward.default(*args)
    assert len({g.untyped_storage()._cdata for g in grads}) == 5


def test_opcheck_compact() -> None:
    case = compact_case()
    torch.library.opcheck(ops.gated_matmul.default, (*case.call(), "auto"))
    y, r, c = ops.gated_matmul.default(*case.call(), "auto")
    args = (torch.randn_like(y), y, r, c, *case.call(), "auto", [True] * 5)
    torch.library.opcheck(ops.gated_matmul_backward.default, args)


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_norm_gather(norm: str) -> None:
    columns = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    torch.library.opcheck(ops.norm_gather.default, (x, columns, weight, bias, 1e-5, norm, "auto"))
    full = {
        "none": lambda t, w, b: t * w + b,
        "rms": lambda t, w, b: F.rms_norm(t, (8,), w, 1e-5) + b,
        "layer": lambda t, w, b: F.layer_norm(t, (8,), w, b, 1e-5),
    }[norm]
    exact = full(x.double(), weight.double(), bias.double())[:, columns.long()]
    plain = full(x, weight, bias)[:, columns.long()]
    assert_no_worse(norm_gather(x, columns, weight, bias, eps=1e-5, norm=norm), plain, exact)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        tensor.requires_grad_()
        y = norm_gather(x, columns, weight, bias, eps=1e-5, norm=norm)
        (ours,) = torch.autograd.grad(y.sin().sum(), tensor)
        (theirs,) = torch.autograd.grad(
            full(x, weight, bias)[:, columns.long()].sin().sum(), tensor
        )
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")
        tensor.requires_grad_(False)


@pytest.mark.parametrize("distribution", ALL)
def test_open_mass(distribution: str) -> None:
    config = GateConfig(distribution=distribution, init_std=1.5, init_mean=-0.5)
    gates = [Gate(size, config) for size in (5, 1, 12)]
    flat = torch.cat([gate.logits for gate in gates])
    offsets = torch.tensor([0, 5, 6, 18])
    shift = {
        "ranking": 0.0,
        "gaussian": config.offset,
        "hard_concrete": config.beta * torch.tensor(-config.gamma / config.zeta).log().item(),
    }[distribution]
    scale = config.open_sigma if distribution == "gaussian" else 1.0
    mass = open_mass(flat, offsets, distribution, shift, scale)
    expected = torch.stack([gate.open_probability().sum() for gate in gates])
    torch.testing.assert_close(mass, expected)
    weights, logits = torch.tensor([1.0, -2.0, 0.5]), [gate.logits for gate in gates]
    ours = torch.autograd.grad((mass * weights).sum(), logits)
    theirs = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(ours, theirs)
    args = (flat.detach().requires_grad_(), offsets, distribution, shift, scale, "auto")
    torch.library.opcheck(ops.open_mass.default, args)
    torch.library.opcheck(
        ops.open_mass_backward.default, (torch.randn(3), args[0].detach(), *args[1:])
    )


@pytest.mark.parametrize("values", [[0, 3], [2, 5], [0], [], [0, 4, 2, 5], [0, 6], [-1, 5]])
def test_open_mass_refuses_offsets_that_leave_logits_out(values: list[int]) -> None:
    """A kernel would write nothing for them, or leave the tensor."""
    offsets = torch.tensor(values, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"offsets must rise from 0 to 5, got \["):
        open_mass(torch.zeros(5), offsets, "gaussian", 0.5)


def test_offsets_are_looked_at_again_when_they_change() -> None:
    offsets = torch.tensor([0, 2, 5])
    open_mass(torch.zeros(5), offsets, "gaussian", 0.5)
    offsets[1] = 7
    with pytest.raises(ValueError, match=r"offsets must rise from 0 to 5, got \[0, 7, 5\]"):
        open_mass(torch.zeros(5), offsets, "gaussian", 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distribution": "bernoulli"}, "distribution must be one of .* got 'bernoulli'"),
        ({"x": torch.zeros(4, 8)}, r"x must have a last dimension of 7, got shape \(4, 8\)"),
        ({"x": torch.zeros(4, 7).double()}, "x must have w's dtype torch.float32, got"),
        ({"b": torch.zeros(8)}, r"b must have shape \(9,\), got \(8,\)"),
        ({"row_logits": torch.zeros(8)}, r"row_logits must be fp32 \[9\] on cpu, got"),
        ({"row_logits": torch.zeros(9).double()}, r"row_logits must be fp32 \[9\] on cpu, got"),
        ({"column_logits": torch.zeros(9)}, r"column_logits must be fp32 \[7\] on cpu, got"),
        ({"row_layout": (4, 2)}, r"layout of row_logits must tile 9 features, got \(4, 2\)"),
        ({"row_layout": (0, 0)}, r"layout of row_logits must tile 9 features, got \(0, 0\)"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, r"seed must be int64 \[2\] on cpu, got"),
        ({"seed": torch.zeros(2)}, r"seed must be int64 \[2\] on cpu, got"),
        (
            {"seed": torch.zeros(2, dtype=torch.int64, device="meta")},
            r"seed must be int64 \[2\] on cpu, got",
        ),
        (
            {"rows": torch.arange(9).int(), "out_features": 10},
            "a compact weight fits ranking gates without",
        ),
        (
            {"rows": torch.arange(9)},
            r"rows must be int32 1-D on cpu, got torch.int64 \(9,\) on cpu",
        ),
        (
            {"columns": torch.zeros(7, dtype=torch.int32, device="meta")},
            "columns must be on w's device cpu, got meta",
        ),
        ({"rows": torch.arange(9).int() + 1}, "rows must be a permutation of 9 features, or some"),
        ({"rows": torch.arange(9).int() - 1}, "rows must be a permutation of 9 features, or some"),
        ({"columns": torch.zeros(7).int()}, "columns must be a permutation of 7 features, or some"),
        ({"out_features": 8}, "out_features must fit w's 9 rows, got 8"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_gated_matmul_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(make((4,), 9, 7), **change)
    assert "\n" not in str(error.value)


def test_a_map_is_read_again_once_it_has_changed() -> None:
    case = compact_case()
    call(case)
    assert case.rows is not None
    for change in (
        lambda rows: rows.flip(0),
        lambda rows: rows.clamp(max=int(rows[-2])),
        lambda rows: rows + 9,
    ):
        kept = case.rows.clone()
        case.rows.copy_(change(case.rows))
        with pytest.raises(ValueError, match="rows must be a permutation of 9 features, or some"):
            call(case)
        case.rows.copy_(kept)
        call(case)


def test_norm_gather_refuses() -> None:
    x, columns, weight = torch.randn(3, 9), torch.tensor([1, 4], dtype=torch.int32), torch.ones(9)
    for change, message in (
        ({"columns": columns.long()}, "columns must be int32 1-D on cpu, got torch.int64"),
        ({"columns": columns + 5}, "columns must be a permutation of 9 features, or some"),
        ({"columns": columns.flip(0)}, "columns must be a permutation of 9 features, or some"),
        ({"weight": weight[1:]}, r"weight must have shape \(9,\) on cpu, got \(8,\) on cpu"),
        ({"bias": weight.to("meta")}, r"bias must have shape \(9,\) on cpu, got \(9,\) on meta"),
        ({"norm": "batch"}, "norm must be one of .* got 'batch'"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            norm_gather(**{"x": x, "columns": columns, **change})
        assert "\n" not in str(error.value)


def test_output_may_change_in_place_where_the_row_gate_gets_no_gradient() -> None:
    for frozen in (True, False):
        case = make((5,), 9, 7)
        case.w.requires_grad_()
        case.column_logits.requires_grad_()  # type: ignore[union-attr]
        case.row_logits.requires_grad_(not frozen)  # type: ignore[union-attr]
        loss = call(case).relu_().sum()
        if frozen:
            loss.backward()
            ours = case.w.grad, case.column_logits.grad  # type: ignore[union-attr]
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
    leaves = (case.w, case.column_logits)
    torch.testing.assert_close(torch.autograd.grad(call(case).relu().sum(), leaves), ours)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["triton", "typo"])
def test_norm_gather_with_gradients_wanted_ignores_no_backend(backend: str) -> None:
    x, columns = torch.randn(3, 9, requires_grad=True), torch.tensor([1, 4], dtype=torch.int32)
    message = "backend must be one of" if backend == "typo" else "gradients are wanted and only"
    with pytest.raises(ValueError, match=message):
        norm_gather(x, columns, backend=backend)


def test_second_derivatives_are_refused() -> None:
    case = make((4,), 9, 7)
    case.x.requires_grad_()
    (dx,) = torch.autograd.grad(call(case).square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.square().sum().backward()


def test_every_op_has_a_table_row_and_an_opcheck() -> None:
    """A new op comes with a row of the table, and with an opcheck in the test of its module."""
    defined = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("finegates::")
    }
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    checked = set(re.findall(r"opcheck\(\s*(?:schema\.)?ops\.(\w+)\.default", tests))
    assert set(TABLE) == defined == checked
