"""Hostile arguments of whole blocks: refused in one line or served, never a crash."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from finegates import _native
from finegates.ops import decoder, encoder_layer
from test_decoder import make as make_stack
from test_decoder import tokens
from test_encoder import make as make_layer

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason()))

ROUNDS = 400
INTEGERS = (-(2**63), -1, 0, 1, 2, 7, 2**24 + 1, 2**31, 2**62, 2**63 - 1)
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8)


def hostile(value: Any, rng: random.Random) -> Any:
    """Return something else in the place of an argument, often of its kind."""
    if isinstance(value, (tuple, list)):
        items = list(value)
        at = rng.randrange(len(items))
        change = rng.randrange(4)
        if change == 0:
            return items[:-1]
        if change == 1:
            return [*items, items[at]]
        items[at] = hostile(items[at], rng)
        return items
    if isinstance(value, Tensor):
        return rng.choice(TENSORS)(value, rng)
    if isinstance(value, bool) or value is None:
        return rng.choice((None, torch.zeros(1, dtype=torch.bool)))
    if isinstance(value, int):
        return rng.choice(INTEGERS)
    if isinstance(value, float):
        return rng.choice((0.0, -1.0, 1e38, float("inf"), float("nan")))
    return rng.choice(("", "tanh", "relu"))


def damaged(value: Tensor, rng: random.Random) -> Tensor:
    """Overwrite one element: a header's or a table's byte, a position, a number."""
    copy = value.clone().contiguous()
    if copy.numel():
        flat = copy.view(-1)
        number = rng.choice((-1, 0, 1, 255, 10**6))
        at = rng.randrange(min(flat.numel(), 256))
        flat[at] = number % 256 if copy.dtype == torch.uint8 else number
    return copy


TENSORS: tuple[Callable[[Tensor, random.Random], Tensor], ...] = (
    damaged,
    damaged,
    lambda t, rng: t.to(rng.choice(DTYPES)),
    lambda t, rng: t[..., :-1],
    lambda t, rng: t[..., : t.shape[-1] // 2] if t.dim() else t,
    lambda t, rng: t[:0] if t.dim() else t,
    lambda t, rng: torch.cat((t, t), -1) if t.dim() else t,
    lambda t, rng: t[None],
    lambda t, rng: t.mT if t.dim() > 1 else t.flip(0),
    lambda t, rng: t.to("meta"),
    lambda t, rng: torch.cat((t, t), -1)[..., 1::2] if t.dim() else t,
)


def attack(op: Callable[..., Tensor], arguments: dict[str, Any], seed: int) -> int:
    """Change one or two arguments of each call; return how many calls were refused."""
    rng, refused = random.Random(seed), 0
    for _ in range(ROUNDS):
        given = {
            name: [t.clone() for t in value] if name in ("keys", "values") else value
            for name, value in arguments.items()
        }
        for name in rng.sample(sorted(given), rng.choice((1, 1, 2))):
            given[name] = hostile(given[name], rng)
        try:
            y = op(**given)
        except (ValueError, TypeError, MemoryError):
            refused += 1
        else:
            assert y.shape == given["x"].shape
    return refused


@pytest.mark.parametrize("seed", range(3))
def test_encoder_layers(seed: int) -> None:
    torch.manual_seed(seed)
    layer = make_layer()
    arguments = {
        "x": torch.randn(2, 5, 53), "packed": layer.packed, "norms": layer.norms, "eps": layer.eps,
        "heads": layer.heads, "head_size": layer.head_size, "scale": layer.scale,
        "activation": layer.activation, "mask": torch.ones(2, 1, 1, 5, dtype=torch.bool),
    }  # fmt: skip
    assert 0.3 * ROUNDS < attack(encoder_layer, arguments, seed) < ROUNDS
    encoder_layer(**arguments)


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("seed", range(2))
def test_decoders(length: int, seed: int) -> None:
    torch.manual_seed(seed)
    stack, x = make_stack(), tokens(2, length)
    cache = stack.cache(2, length + 4)
    arguments = {
        "x": x, "packed": stack.packed, "mask": torch.ones(2, length + 4, dtype=torch.bool),
        **stack.arguments(x, cache, 3),
    }  # fmt: skip
    assert 0.3 * ROUNDS < attack(decoder, arguments, seed) < ROUNDS
    decoder(**arguments)
