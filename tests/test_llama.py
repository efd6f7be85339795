"""Fused Llama, Mistral and Qwen2 bodies in whole models: same tokens, caches that stay valid."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer

from finegates import GateMap, gate_, optimize_for_cpu, prune_, restore_
from finegates.ops import _cpu_blocks, use_backend
from finegates.serving import llama
from finegates.serving.fused import FusedBlock
from numerics import assert_no_worse
from serving_case import check_threads_serve_as_one_does, pruned
from shared_data import shared
from tiny_models import VOCABULARY, inputs, logits

FAMILIES = ("llama", "mistral", "qwen2")
# Steps read the cache as it lies where a head fills whole registers, and panels of it elsewhere.
HEADS = pytest.mark.parametrize("head_dim", [6, 16])


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
    original = _cpu_blocks.decoder

    def counted(x: Tensor, *args: Any) -> Tensor:
        made.append(x.shape[1])
        return original(x, *args)

    monkeypatch.setattr(llama._cpu_blocks, "decoder", counted)
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
@HEADS
def test_same_256_tokens(family: str, head_dim: int, calls: list[int]) -> None:
    plain = build(family, max_position_embeddings=512, head_dim=head_dim)
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
@HEADS
def test_generates_the_same_tokens(
    options: dict[str, Any], head_dim: int, calls: list[int]
) -> None:
    plain = build(head_dim=head_dim)
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


@HEADS
def test_a_sequence_does_not_see_its_batch(head_dim: int) -> None:
    """Bitwise through the model: prompt and steps, alone and padded on the left."""
    ours, pads = fused(build(head_dim=head_dim)), (0, 3, 6)
    options = {"output_logits": True, "return_dict_in_generate": True}
    batch = prompt(3, 8, pads)  # 16 rows for each key head, the most for the way of few
    together = generate(ours, 12, **batch, **options)
    for i, pad in enumerate(pads):
        alone = {name: t[i : i + 1, pad:] for name, t in batch.items()}
        single = generate(ours, 12, **alone, **options)
        assert torch.equal(single.sequences[0], together.sequences[i, pad:])
        for a, b in zip(single.logits, together.logits, strict=True):
            assert torch.equal(a[0], b[i])


def test_threads_of_python() -> None:
    """A prompt and a step after it, each request with a cache of its own."""
    ours = fused(build())
    requests = [prompt(1 + i % 3, 2 + 5 * i % 23)["input_ids"] for i in range(30)]

    @torch.no_grad()
    def serve(ids: Tensor) -> Tensor:
        first = ours(ids, use_cache=True)
        step = ours(ids[:, :1], past_key_values=first.past_key_values)
        return torch.cat((first.logits, step.logits), dim=1)

    check_threads_serve_as_one_does(serve, requests)


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


def replace_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight = nn.Parameter(torch.full((24,), 0.3))


def replace_norms_memory(model: Any) -> None:
    model.model.layers[1].input_layernorm.weight.data = torch.linspace(-1, 1, 24)


def write_norm_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[::2] *= 1.5


def load_layer(model: Any) -> None:
    layer = model.model.layers[0]
    state = layer.state_dict()
    layer.load_state_dict({n: t * 0.5 if t.is_floating_point() else t for n, t in state.items()})


def replace_layer(model: Any) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])


def replace_linear(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.down_proj = nn.Linear(mlp.down_proj.in_features, 24).requires_grad_(False)


def drop_layers(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def use_fewer_layers(model: Any) -> None:
    model.config.num_hidden_layers = 1


@pytest.mark.parametrize(
    ("change", "native"),
    [
        (replace_norm, True),
        (replace_norms_memory, True),
        (write_norm_in_place, True),
        (load_layer, True),
        (replace_layer, False),  # both cache as layer 0
        (replace_linear, False),
        (drop_layers, False),
        (use_fewer_layers, False),
    ],
)
def test_follows_every_change(change: Any, native: bool, calls: list[int]) -> None:
    torch.manual_seed(0)
    options = {**inputs(), "use_cache": False}  # a layer that caches as another one breaks caches
    ours = fused(build())
    with torch.no_grad():
        before = ours(**options).logits
        change(ours)
        calls.clear()
        after = ours(**options).logits
        assert len(calls) == native
        torch.testing.assert_close(after, restore_(copy.deepcopy(ours))(**options).logits)
    assert not torch.allclose(after, before)


def test_follows_one_layers_dtype(calls: list[int]) -> None:
    ours = fused(build())
    logits(ours)
    ours.model.layers.bfloat16()
    ours.model.norm.bfloat16()
    embeds = torch.randn(1, 5, 24).bfloat16()
    with torch.no_grad():
        native = ours.model(inputs_embeds=embeds).last_hidden_state
        assert calls == [9, 5]
        plain = restore_(ours).model(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(native, plain, rtol=0.05, atol=0.05)


def test_unknown_arguments_take_the_plain_way(calls: list[int]) -> None:
    plain = build()
    ours = fused(plain)
    extras = {"token_type_ids": torch.zeros(3, 9).long(), "cache_position": torch.arange(9)}
    with torch.no_grad():
        a, b = (m(**inputs(), **extras).logits for m in (ours, plain))
    torch.testing.assert_close(a, b)
    assert calls == []


def test_embeds_once() -> None:
    ours = fused(build())
    seen: list[int] = []
    ours.model.embed_tokens.register_forward_hook(lambda *_: seen.append(1))
    for changes in ({}, {"attention_mask": torch.randn(3, 1, 9, 9)}):
        with torch.no_grad():
            ours(**{**inputs(), **changes})
    assert seen == [1, 1]


@pytest.mark.parametrize("start", [-5, 10**9], ids=["negative", "huge"])
def test_positions_anywhere(start: int, calls: list[int]) -> None:
    plain = build()
    ours = fused(plain)
    positions = torch.arange(start, start + 9)[None]
    with torch.no_grad():
        a, b = (m(**inputs(), position_ids=positions).logits for m in (ours, plain))
    torch.testing.assert_close(a, b)
    assert calls == [9]


def test_named_backends(calls: list[int]) -> None:
    plain = build()
    ours = fused(plain)
    with use_backend("torch"):
        torch.testing.assert_close(logits(ours), logits(plain))
        assert torch.equal(generate(ours, 8), generate(plain, 8))
    assert calls == []
    with use_backend("native"):
        torch.testing.assert_close(logits(ours), logits(plain))


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


def add_hook(body: Any) -> None:
    body.layers[1].mlp.register_forward_hook(lambda *_: None)


def change_epsilon(body: Any) -> None:
    body.layers[1].input_layernorm.variance_epsilon = 0.5


def change_scale(body: Any) -> None:
    body.layers[1].self_attn.scaling = 0.1


def change_class(body: Any) -> None:
    attention = body.layers[0].self_attn
    attention.__class__ = type("Other", (type(attention),), {})


@pytest.mark.parametrize("change", [add_hook, change_epsilon, change_scale, change_class])
def test_uncommon_bodies_stay_plain(change: Any) -> None:
    plain = build()
    change(plain.model)
    before = logits(plain)
    ours = optimize_for_cpu(plain)
    assert not isinstance(ours.model, FusedBlock)
    torch.testing.assert_close(logits(ours), before)


def test_hooks_of_transformers_leave_a_body_fusable() -> None:
    plain = build()
    with torch.no_grad():
        plain(**inputs(), output_hidden_states=True)
    assert any(m._forward_hooks for m in plain.model.layers.modules())
    fused(plain)


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


def test_a_refused_train_refuses_forward_until_eval() -> None:
    ours = fused(build())
    before = logits(ours)
    with pytest.raises(RuntimeError, match=r"finegates\.restore_"):
        ours.train()
    with pytest.raises(RuntimeError, match=r"call eval\(\)"):
        logits(ours)
    assert torch.equal(logits(ours.eval()), before)


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
