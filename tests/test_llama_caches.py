"""Caches of fused bodies stay valid: ours, transformers' and somebody's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from llama_case import build, count_calls, fused, prompt
from tiny_models import inputs


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of new tokens of each native call."""
    return count_calls(monkeypatch)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_the_cache_stays_valid(static: bool) -> None:
    """Each step may be ours or transformers': the same cache serves both."""
    plain = build()
    ours = fused(plain)
    ids = prompt(2, 12)["input_ids"]
    make: Any = (
        (lambda: StaticCache(config=plain.config, max_cache_len=24)) if static else DynamicCache
    )
    cache, whole = make(), make()
    with torch.no_grad():
        for i, (model, start, end) in enumerate(
            [(ours, 0, 5), (plain, 5, 6), (ours, 6, 9), (plain, 9, 10), (ours, 10, 12)]
        ):
            a = model(ids[:, start:end], past_key_values=cache).logits
            b = plain(ids[:, start:end], past_key_values=whole).logits
            torch.testing.assert_close(a, b, msg=f"step {i}")
    for one, other in zip(cache.layers, whole.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)
    assert int(cache.get_seq_length()) == 12


def test_cropped_reordered_and_copied_caches() -> None:
    plain = build()
    ours = fused(plain)
    ids = prompt(2, 10)["input_ids"]
    results = []
    for model in (plain, ours):
        cache = DynamicCache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
            branch = copy.deepcopy(cache)
            first = model(ids[:, :1], past_key_values=branch).logits
            cache.crop(-3)
            cache.crop(-1)
            cache.reorder_cache(torch.tensor([1, 0]))
            second = model(ids[:, :2], past_key_values=cache).logits
            cache.batch_repeat_interleave(2)
            third = model(ids[:, :1].repeat(2, 1), past_key_values=cache).logits
            again = model(ids[:, :1], past_key_values=copy.deepcopy(branch)).logits
        assert all(isinstance(layer, DynamicLayer) for layer in cache.layers)
        with pytest.raises(ValueError, match="positive value"):
            cache.layers[0].crop(2)
        results.append((first, second, third, again))
    torch.testing.assert_close(*results)


class OwnCache(DynamicCache):
    """Somebody's cache, which may do more than ours knows."""


class Wrapped:
    """A cache without ``layers``."""

    def __init__(self) -> None:
        self.cache = DynamicCache()

    def __getattr__(self, name: str) -> Any:
        if name in ("cache", "layers"):
            raise AttributeError(name)
        return getattr(self.cache, name)


def test_other_caches_take_the_plain_way(calls: list[int]) -> None:
    plain = build()
    ours = fused(plain)
    for make in (OwnCache, Wrapped):
        with torch.no_grad():
            a, b = (m(**inputs(), past_key_values=make()).logits for m in (ours, plain))
        torch.testing.assert_close(a, b)
    assert calls == []


def test_a_static_cache_with_uneven_layers_takes_the_plain_way(calls: list[int]) -> None:
    ours = fused(build())
    cache = StaticCache(config=ours.config, max_cache_len=24)
    ids = prompt(1, 4)["input_ids"]
    with torch.no_grad():
        ours(ids, past_key_values=cache)
        cache.layers[1].cumulative_length.sub_(1)
        ours(ids, past_key_values=cache)
    assert calls == [4]


def test_a_cache_never_writes_into_what_it_was_given() -> None:
    ours = fused(build())
    ids = prompt(1, 8)["input_ids"]
    cache = DynamicCache()
    with torch.no_grad():
        ours(ids, past_key_values=cache)
        given = [layer.keys.clone() for layer in cache.layers]
        before = [tokens.clone() for tokens in given]
        for layer, tokens in zip(cache.layers, given, strict=True):
            layer.keys = tokens
        cache.crop(-4)
        ours(ids[:, :2], past_key_values=cache)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_a_cache_made_in_inference_mode_goes_on_outside() -> None:
    plain = build()
    ids = prompt(1, 9)["input_ids"]
    results = []
    for model in (fused(plain), plain):
        cache = DynamicCache()
        with torch.inference_mode():
            model(ids[:, :5], past_key_values=cache)
        with torch.no_grad():
            model(ids[:, 5:7], past_key_values=cache)
            results.append(plain(ids[:, 7:], past_key_values=cache).logits)
    torch.testing.assert_close(*results)
