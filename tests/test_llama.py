"""Fused Llama, Mistral and Qwen2 bodies in whole models: same tokens, caches that stay valid."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from finegates import GateMap, gate_, optimize_for_cpu, prune_, restore_
from finegates.ops import _cpu
from finegates.serving import llama
from finegates.serving.fused import FusedBlock
from numerics import assert_no_worse
from serving_case import pruned
from shared_data import shared
from tiny_models import VOCABULARY, inputs, logits

FAMILIES = ("llama", "mistral", "qwen2")


def build(family: str = "llama", **changes: Any) -> PreTrainedModel:
    if family == "mistral":
        changes = {"sliding_window": None, **changes}
    return pruned(family, **changes)


def fused(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    optimized = optimize_for_cpu(copy.deepcopy(model), **options)
    assert isinstance(optimized.model, FusedBlock)
    return optimized


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of new tokens of each native call."""
    made: list[int] = []
    original = _cpu.decoder

    def counted(x: Tensor, *args: Any) -> Tensor:
        made.append(x.shape[1])
        return original(x, *args)

    monkeypatch.setattr(llama._cpu, "decoder", counted)
    return made


def prompt(batch: int = 1, length: int = 7, pads: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Token ids and a mask; ``pads`` tokens of padding on the left of each sequence."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for i, pad in enumerate(pads):
        ids[i, :pad], mask[i, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, tokens: int = 30, **options: Any) -> Tensor:
    options = {**prompt(), "do_sample": False, **options}
    result: Tensor = model.generate(max_new_tokens=tokens, min_new_tokens=tokens, **options)
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_transformers(family: str, calls: list[int]) -> None:
    plain = build(family)
    ours = fused(plain)
    torch.testing.assert_close(logits(ours), logits(plain))
    cases: list[dict[str, Any]] = [
        {},
        {"use_cache": False},
        {"attention_mask": None},
        {"position_ids": torch.arange(3, 12)[None]},
        {"attention_mask": torch.ones(3, 1, 9, 9).tril().bool()},
        {"input_ids": None, "inputs_embeds": torch.randn(3, 9, 24)},
    ]
    calls.clear()
    for case in cases:
        with torch.no_grad():
            a, b = ours(**{**inputs(), **case}), plain(**{**inputs(), **case})
        torch.testing.assert_close(a.logits, b.logits)
        assert (a.past_key_values is None) == (b.past_key_values is None)
    assert calls == [9] * len(cases)


def test_what_goes_the_plain_way(calls: list[int]) -> None:
    plain = build()
    ours = fused(plain)
    for case in ({"output_hidden_states": True}, {"output_attentions": True}):
        for model in (plain, ours):
            model.set_attn_implementation("eager")
        with torch.no_grad():
            a, b = (m(**inputs(), **case) for m in (ours, plain))
        for name in ("logits", "hidden_states", "attentions"):
            torch.testing.assert_close(a.get(name), b.get(name))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours(**inputs())
    bias = torch.randn(3, 1, 9, 9)
    with torch.no_grad():
        a, b = (m(**{**inputs(), "attention_mask": bias}).logits for m in (ours, plain))
    torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        ours()
    assert calls == []


@pytest.mark.parametrize("family", FAMILIES)
def test_same_256_tokens(family: str, calls: list[int]) -> None:
    plain = build(family, max_position_embeddings=512)
    assert torch.equal(generate(fused(plain), 256), generate(plain, 256))
    assert calls == [7, *[1] * 255]


def test_same_256_tokens_of_a_trained_model() -> None:
    model = gate_(AutoModelForCausalLM.from_pretrained(shared("stories260k/hf")).eval())
    generator = torch.Generator().manual_seed(0)
    gates = GateMap(model)
    with torch.no_grad():
        for gate in gates.gates():
            gate.logits.copy_(torch.randn(gate.logits.shape, generator=generator))
    gates.project_(0.2)
    plain = prune_(model).eval()
    options = {"input_ids": torch.tensor([[1, 403]]), "attention_mask": torch.ones(1, 2).long()}
    assert torch.equal(generate(fused(plain), 256, **options), generate(plain, 256, **options))


@pytest.mark.parametrize("rope", ["linear", "dynamic", "llama3", "yarn"])
def test_every_rope(rope: str) -> None:
    parameters = {
        "rope_type": rope, "rope_theta": 10000.0, "factor": 2.0,
        "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }  # fmt: skip
    plain = build(rope_parameters=parameters)
    assert torch.equal(generate(fused(plain), 40), generate(plain, 40))


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {**prompt(3, 9, (0, 4, 8))},
        {**prompt(3, 9, (0, 4, 8)), "num_beams": 2},
        {**prompt(2, 9, (5, 0)), "cache_implementation": "static"},
    ],
    ids=["static", "beams", "padded", "padded-beams", "padded-static"],
)
def test_generates_the_same_tokens(options: dict[str, Any], calls: list[int]) -> None:
    plain = build()
    assert torch.equal(generate(fused(plain), **options), generate(plain, **options))
    assert len(calls) == 30


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


def test_bf16_is_no_worse() -> None:
    plain = build(hidden_size=48, head_dim=16).bfloat16()
    exact = copy.deepcopy(plain).double()
    ours, ids = fused(plain), prompt(4, 40)["input_ids"]
    with torch.no_grad():
        whole = [m(ids).logits for m in (ours, plain, exact)]
        steps = []
        for model in (ours, plain, exact):
            cache = DynamicCache()
            steps.append(
                torch.cat([model(t, past_key_values=cache).logits for t in ids.split(1, 1)], 1)
            )
    for results in (whole, steps):
        assert_no_worse(*results)


def test_int8() -> None:
    plain = build()
    ours = fused(plain, weight_dtype="int8")
    rounded = restore_(copy.deepcopy(ours))
    torch.testing.assert_close(logits(ours), logits(rounded))
    assert torch.equal(generate(ours, 30), generate(rounded, 30))


def test_a_sequence_does_not_see_its_batch() -> None:
    """Bitwise through the model: prompt and steps, alone and padded on the left."""
    ours, pads = fused(build()), (0, 3, 6)
    options = {"output_logits": True, "return_dict_in_generate": True}
    batch = prompt(3, 9, pads)
    together = generate(ours, 12, **batch, **options)
    for i, pad in enumerate(pads):
        alone = {name: t[i : i + 1, pad:] for name, t in batch.items()}
        single = generate(ours, 12, **alone, **options)
        assert torch.equal(single.sequences[0], together.sequences[i, pad:])
        for a, b in zip(single.logits, together.logits, strict=True):
            assert torch.equal(a[0], b[i])


def test_threads_of_python() -> None:
    ours = fused(build())
    requests = [prompt(1 + i % 3, 3 + 2 * i, (0, 2, 1)[: 1 + i % 3]) for i in range(5)]
    expected = [generate(ours, 12, **request) for request in requests]
    right: list[bool] = []

    def worker(start: int) -> None:
        for i in range(start, start + 10):
            result = generate(ours, 12, **requests[i % 5])
            right.append(torch.equal(result, expected[i % 5]))

    workers = [threading.Thread(target=worker, args=(i,)) for i in range(4)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert right == [True] * 40


def test_follows_its_weights() -> None:
    plain = build()
    ours = fused(plain)
    before = logits(ours)
    copied = copy.deepcopy(ours)
    other = build(seed=1)
    ours.load_state_dict(build().state_dict())
    assert torch.equal(logits(ours), before)
    assert torch.equal(logits(copied), before)
    assert logits(ours.bfloat16()).dtype == torch.bfloat16
    assert not torch.equal(logits(fused(other)), before)
    restored = restore_(copied)
    assert type(restored.model) is type(plain.model)
    assert torch.equal(logits(restored), logits(plain))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        ("llama", {"hidden_act": "relu6"}),
    ],
)
def test_bodies_that_stay_plain(family: str, changes: dict[str, Any]) -> None:
    plain = pruned(family, **changes)
    ours = optimize_for_cpu(copy.deepcopy(plain))
    assert type(ours.model) is type(plain.model)
    torch.testing.assert_close(logits(ours), logits(plain))
