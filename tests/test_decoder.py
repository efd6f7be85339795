"""The op of a stack of Llama layers: against its reference, invariant, and what it refuses.

``test_every_level`` runs this file again in a subprocess for each lower level.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from finegates import _native
from finegates.ops import (
    _cpu_blocks,
    decoder,
    pack,
    reference,
    reference_blocks,
    schema,
    unpack,
)
from finegates.report.timing import threads_set_to
from levels import LEVELS, run_capped
from numerics import assert_no_worse

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason()))

F32, BF16, I8 = torch.float32, torch.bfloat16, torch.int8
HIDDEN, INNER = 53, 70


@dataclass(frozen=True)
class Stack:
    """Two unevenly pruned layers, nothing a multiple of a register but, maybe, the head."""

    packed: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    heads: int
    groups: int
    head: int
    dtype: torch.dtype

    def angles(self, positions: int) -> Tensor:
        steps = 100.0 ** (-torch.arange(0, self.head, 2) / self.head)
        return (torch.arange(positions)[:, None] * steps).repeat(1, 2)

    def cache(self, batch: int, tokens: int, seed: int = 5) -> list[Tensor]:
        g = torch.Generator().manual_seed(seed)
        shape = (batch, self.groups, tokens, self.head)
        return [torch.randn(shape, generator=g).to(self.dtype) for _ in range(4)]

    def arguments(self, x: Tensor, cache: list[Tensor], past: int) -> dict[str, Any]:
        angles = self.angles(cache[0].shape[2])
        return {
            "norms": self.norms,
            "cos": angles.cos().to(self.dtype),
            "sin": angles.sin().to(self.dtype),
            "positions": (past + torch.arange(x.shape[1])).expand(x.shape[:2]),
            "keys": cache[:2],
            "values": cache[2:],
            "past": past,
            "eps": 1e-5,
            "scale": self.head**-0.5,
            "activation": "silu",
        }

    def __call__(
        self, x: Tensor, cache: list[Tensor], past: int, mask: Tensor | None = None, **more: Any
    ) -> Tensor:
        return decoder(x, self.packed, mask=mask, **{**self.arguments(x, cache, past), **more})

    def plain(
        self, x: Tensor, cache: list[Tensor], past: int, mask: Tensor | None = None
    ) -> Tensor:
        """The reference at x's dtype, from the same rounded operands."""
        args = self.arguments(x, cache, past)
        layers = [unpack(p) for p in self.packed]
        if x.dtype == torch.float64:
            args = {k: _double(v) for k, v in args.items()}
            layers = [reference.Operands(*map(_double, layer)) for layer in layers]
        sizes = (self.heads * self.head, *2 * (self.groups * self.head,), HIDDEN, INNER, INNER)
        return reference_blocks.decoder(
            x, list(zip(layers, 2 * (*sizes, HIDDEN), strict=True)), mask=mask, **args
        )


def _double(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_double(v) for v in value]
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floats else value


def make(
    heads: int = 6,
    groups: int = 2,
    head: int = 16,
    dtype: torch.dtype = F32,
    weight: torch.dtype | None = None,
    seed: int = 0,
) -> Stack:
    g = torch.Generator().manual_seed(seed)

    def kept(full: int, share: float) -> Tensor:
        return torch.randperm(full, generator=g)[: int(share * full)].sort().values.int()

    def linear(k: int, n: int, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        rows = kept(n, 0.7) if rows is None else rows
        columns = kept(k, 0.8) if columns is None else columns
        w = torch.randn(len(rows), len(columns), generator=g) / len(columns) ** 0.5
        bias = 0.1 * torch.randn(len(rows), generator=g)
        return pack(w.to(dtype), bias, rows, columns, n, k, dtype=weight)

    packed: list[Tensor] = []
    for _ in range(2):
        packed += [linear(HIDDEN, n * head) for n in (heads, groups, groups)]
        rows, columns = kept(INNER, 0.6), kept(HIDDEN, 0.8)
        packed += [linear(heads * head, HIDDEN)]
        packed += [linear(HIDDEN, INNER, rows, columns) for _ in range(2)]
        packed += [linear(INNER, HIDDEN)]
    norms = [1.0 + 0.2 * torch.randn(HIDDEN, generator=g) for _ in range(5)]
    return Stack(tuple(packed), tuple(n.to(dtype) for n in norms), heads, groups, head, dtype)


def tokens(batch: int, length: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(batch, length, HIDDEN).to(dtype)


def copies(cache: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in cache]


def check(stack: Stack, batch: int, length: int, past: int, mask: Tensor | None = None) -> None:
    x = tokens(batch, length, stack.dtype)
    before = stack.cache(batch, past + length + 2)
    ours, plain, exact = (copies(before) for _ in range(3))
    results = (
        stack(x, ours, past, mask),
        stack.plain(x, plain, past, mask),
        stack.plain(x.double(), [t.double() for t in exact], past, mask),
    )
    assert_no_worse(*results)
    end = past + length
    for a, b, c in zip(ours, plain, before, strict=True):
        assert (a[:, :, past:end] - b[:, :, past:end]).abs().max() < 0.1
        assert torch.equal(a[:, :, :past], c[:, :, :past])
        assert torch.equal(a[:, :, end:], c[:, :, end:])


@pytest.mark.parametrize("weight", [None, BF16, I8], ids=["own", "w16", "w8"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["x32", "x16"])
@pytest.mark.parametrize(("length", "past"), [(1, 0), (1, 30), (3, 5), (20, 0), (17, 400)])
def test_no_worse_than_the_reference(
    dtype: torch.dtype, weight: torch.dtype | None, length: int, past: int
) -> None:
    check(make(dtype=dtype, weight=weight), 2, length, past)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["x32", "x16"])
@pytest.mark.parametrize(
    ("heads", "groups", "head"),
    [(1, 1, 2), (4, 1, 8), (5, 5, 40), (9, 3, 64), (70, 1, 6), (2, 1, 384)],
)
def test_heads_of_any_size(heads: int, groups: int, head: int, dtype: torch.dtype) -> None:
    stack = make(heads, groups, head, dtype)
    check(stack, 1, 1, 9)
    check(stack, 1, 40, 3)


@pytest.mark.parametrize("length", [1, 30])
def test_masks(length: int) -> None:
    stack, past = make(), 12
    left = torch.arange(past + length) >= torch.tensor([0, 5])[:, None]
    holes = torch.rand(2, past + length + 4) < 0.7
    whole = torch.rand(2, length, past + length) < 0.7
    nothing = torch.zeros(2, length, past + length, dtype=torch.bool)
    for mask in (left, holes, whole, nothing, whole[:1].expand(2, -1, -1)):
        check(stack, 2, length, past, mask)


def test_more_keys_than_one_block() -> None:
    stack = make()
    check(stack, 1, 2, 900)
    check(stack, 1, 500, 300)
    check(stack, 1, 40, 900, torch.arange(940)[None] >= 500)


@pytest.mark.parametrize("length", [1, 2, 23])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["x32", "x16"])
def test_a_sequence_does_not_see_its_batch(dtype: torch.dtype, length: int) -> None:
    """Bitwise: batch, padding on the left and threads."""
    stack, past, pads = make(dtype=dtype), 21, (0, 4, 0, 17)
    x, whole = tokens(4, length, dtype), stack.cache(4, past + length)
    alone = []
    for i, pad in enumerate(pads):
        own = [t[i : i + 1, :, pad:].clone() for t in whole]
        positions = (past + torch.arange(length))[None]
        angles = stack.angles(past + length)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        alone.append(stack(x[i : i + 1], own, past - pad, positions=positions, cos=cos, sin=sin))
    mask = torch.arange(past + length) >= torch.tensor(pads)[:, None]
    for threads in (1, 2, 3):
        with threads_set_to(threads):
            together = stack(x, copies(whole), past, mask)
            assert torch.equal(together, torch.cat(alone))


def test_threads_of_python() -> None:
    stack, results = make(), {}
    work = [(length, past) for length in (1, 3, 40) for past in (0, 50)]
    inputs = [tokens(1 + i % 2, length) for i, (length, _) in enumerate(work)]

    def run(i: int) -> Tensor:
        length, past = work[i]
        return stack(inputs[i], stack.cache(len(inputs[i]), past + length), past)

    expected = [run(i) for i in range(len(work))]

    def worker(name: int) -> None:
        results[name] = all(
            torch.equal(run(i), expected[i]) for _ in range(5) for i in range(len(work))
        )

    workers = [threading.Thread(target=worker, args=(i,)) for i in range(4)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert results == dict.fromkeys(range(4), True)


def test_as_torch_sees_it() -> None:
    stack, x = make(), tokens(1, 3)
    cache = stack.cache(1, 8)
    a = stack.arguments(x, cache, 2)
    args = (
        x, list(stack.packed), list(stack.norms), a["cos"], a["sin"], a["positions"], a["keys"],
        a["values"], 2, None, 1e-5, stack.head**-0.5, "silu",
    )  # fmt: skip
    torch.library.opcheck(schema.ops.decoder.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"past": 9}, "room for 8 tokens, got 9"),
        ({"past": -1}, "room for 8 tokens, got -1"),
        ({"positions": torch.tensor([[8]])}, r"positions must lie in \[0, 8\), got 8"),
        ({"positions": torch.tensor([0])}, r"positions must be \[1, 1\]"),
        ({"cos": torch.zeros(8, 14)}, r"cos must be torch.float32 \[P, 16\]"),
        ({"mask": torch.ones(1, 3).bool()}, "mask covers 3 tokens, not 6"),
        ({"mask": torch.ones(1, 6)}, "mask must be bool"),
        ({"mask": torch.ones(2, 6).bool()}, "mask must be bool"),
        ({"activation": "tanh"}, "got 'tanh'"),
        ({"norms": ()}, "norms must hold 5 tensors, got 0"),
        ({"norms": 5 * (torch.ones(HIDDEN + 1),)}, "x must be"),
        ({"norms": (*4 * (torch.ones(HIDDEN),), torch.ones(3))}, "norms must be"),
        ({"keys": ()}, "keys must hold 2 tensors"),
        ({"values": 2 * (torch.zeros(1, 2, 9, 16),)}, "values must be"),
        ({"keys": 2 * (torch.zeros(1, 2, 8),)}, "keys must be"),
        ({"keys": 2 * (torch.zeros(1, 2, 8, 0),)}, "keys must be"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    stack = make()
    with pytest.raises(ValueError, match=message):
        stack(tokens(1, 1), stack.cache(1, 8), **{"past": 5, **change})


@pytest.mark.parametrize(
    "name", ["packed", "norms", "cos", "sin", "positions", "keys", "values", "mask"]
)
def test_operands_elsewhere(name: str) -> None:
    stack, x = make(), tokens(1, 1)
    given: dict[str, Any] = {
        "packed": stack.packed,
        "mask": torch.ones(1, 8).bool(),
        **stack.arguments(x, stack.cache(1, 8), 5),
    }
    value = given[name]
    moved = value.to("meta") if isinstance(value, Tensor) else [*value[:-1], value[-1].to("meta")]
    with pytest.raises(ValueError, match=f"{name} must be .*meta"):
        decoder(x, **{**given, name: moved})


@pytest.mark.parametrize("length", [1, 40])
def test_stages_are_timed_on_request(length: int, threads: int) -> None:
    stack, x = make(), tokens(1, length)
    plain = stack(x, stack.cache(1, length), 0)
    begin = time.perf_counter()
    with _cpu_blocks.timed_stages() as found:
        assert torch.equal(stack(x, stack.cache(1, length), 0), plain)
        stack(x, stack.cache(1, length), 0)
    elapsed = time.perf_counter() - begin
    stack(x, stack.cache(1, length), 0)
    assert [len(seconds) for seconds in found] == 2 * [2 * _cpu_blocks.STAGES + 1]
    for seconds in found:
        assert bool((seconds > 0).all())
    assert sum(float(seconds.sum()) for seconds in found) < elapsed


def test_null_pointers_and_impossible_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the extension itself refuses."""
    stack, x, recorded = make(), tokens(1, 1), []
    cache = stack.cache(1, 8)
    layers = _cpu_blocks.DecoderLayers(stack.packed, stack.norms)
    given = stack.arguments(x, cache, 5)
    del given["norms"]
    native = vars(_native._C) | {"decoder": lambda *args: recorded.extend(args)}
    with monkeypatch.context() as patch:
        patch.setattr(_cpu_blocks, "_C", SimpleNamespace(**native))
        _cpu_blocks.decoder(x, layers, mask=None, **given)

    def call(changes: dict[int, object]) -> None:
        _native._C.decoder(*(changes.get(i, value) for i, value in enumerate(recorded)))

    for at in (0, 3, 4, 5, 13, 14, 16):
        with pytest.raises(ValueError, match="is null"):
            call({at: 0})
    with pytest.raises(ValueError, match="is null"):
        call({2: [*recorded[2][:-1], 0]})
    with pytest.raises(ValueError, match="too many rows"):
        call({10: (2**24, 8, *recorded[10][2:]), 11: 0})
    for capacity in (-(2**63), 2**63 - 1, 0):
        with pytest.raises(ValueError, match="size of the decoder"):
            call({12: capacity})


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["x32", "x16"])
def test_nan_stays_one(dtype: torch.dtype, length: int) -> None:
    """A query all of whose scores are NaN isn't one that sees nothing."""
    stack, x = make(dtype=dtype), tokens(2, length, dtype)
    cache = stack.cache(2, length + 4)
    clean = stack(x, copies(cache), 4)
    x[1, 0] = torch.nan
    ours, plain = stack(x, copies(cache), 4), stack.plain(x, copies(cache), 4)
    assert torch.equal(ours.isnan(), plain.isnan())
    assert ours[1, 0].isnan().all()
    assert torch.equal(ours[0], clean[0])


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["x32", "x16"])
def test_nan_scores_alone(dtype: torch.dtype, length: int) -> None:
    """x and the values are finite; every key that the first token sees is NaN."""
    stack, x = make(dtype=dtype), tokens(1, length, dtype)
    cache = stack.cache(1, length + 4)
    for keys in cache[:2]:
        keys[:, :, :4] = torch.nan
    mask = torch.ones(1, length, length + 4, dtype=torch.bool)
    mask[:, :, 4:] = False
    assert stack(x, copies(cache), 4, mask).isnan().all()
    assert stack.plain(x, copies(cache), 4, mask).isnan().all()


FOREIGN = """
import ctypes, sys
import torch
sys.path.insert(0, {folder!r})
from test_decoder import make, tokens
torch.set_num_threads(2)
stack, x = make(), tokens(2, 40)
expected, results = stack(x, stack.cache(2, 50), 5), []
openmp = ctypes.CDLL("libgomp.so.1")
@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def body(_):
    if openmp.omp_get_thread_num() == 0:
        results.append(stack(x, stack.cache(2, 50), 5))
openmp.GOMP_parallel(body, None, 2, 0)
assert torch.equal(results[0], expected)
"""


def test_inside_a_foreign_parallel_region() -> None:
    """It runs alone there and waits for no thread of that region."""
    code = FOREIGN.format(folder=str(Path(__file__).parent))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_refuses_layers_that_do_not_fit() -> None:
    stack = make()
    for at in range(7):
        packed = list(stack.packed)
        packed[at] = pack(torch.randn(16, 9))
        with pytest.raises(ValueError, match="the packed layer|must keep the same|must divide"):
            replace(stack, packed=tuple(packed))(tokens(1, 1), stack.cache(1, 4), 0)
    with pytest.raises(ValueError, match="7 layers for each block, got 13"):
        replace(stack, packed=stack.packed[1:])(tokens(1, 1), stack.cache(1, 4), 0)
    with pytest.raises(ValueError, match="has none"):
        stack(tokens(1, 1).requires_grad_(), stack.cache(1, 4), 0)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level(level: str) -> None:
    """The whole file again with the instruction set capped."""
    run_capped(__file__, level)
