"""Fused Llama, Mistral and Qwen2 bodies in whole models: same tokens, other ways, changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, pipeline

from finegates import GateMap, gate_, optimize_for_cpu, prune_, restore_
from finegates.ops import use_backend
from finegates.serving.fused import FusedBlock
from llama_case import build, count_calls, fused, generate, prompt
from numerics import assert_no_worse
from serving_case import check_threads_serve_as_one_does, pruned, words
from shared_data import shared
from tiny_models import inputs, logits

FAMILIES = ("llama", "mistral", "qwen2")
# Steps read the cache as it lies where a head fills whole registers, and panels of it elsewhere.
HEADS = pytest.mark.parametrize("head_dim", [6, 16])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of new tokens of each native call."""
    return count_calls(monkeypatch)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_four_threads_serve_as_one_does(dtype: torch.dtype) -> None:
    """A prompt and a step after it, each request with a cache of its own."""
    ours = fused(build().to(dtype))
    requests = [prompt(1 + i % 3, 2 + 5 * i % 23)["input_ids"] for i in range(30)]

    @torch.no_grad()
    def serve(ids: Tensor) -> Tensor:
        first = ours(ids, use_cache=True)
        step = ours(ids[:, :1], past_key_values=first.past_key_values)
        return torch.cat((first.logits, step.logits), dim=1)

    check_threads_serve_as_one_does(serve, requests)


def test_compiles() -> None:
    """Compiled, the body takes its own forward over the packed Linears: a prompt and a step."""
    ours = fused(build())
    compiled, ids = torch.compile(ours, backend="aot_eager"), prompt(2, 7)["input_ids"]
    with torch.no_grad():
        for options in ({}, {"use_cache": False}):
            torch.testing.assert_close(compiled(ids, **options).logits, ours(ids).logits)
        caches = [model(ids, use_cache=True).past_key_values for model in (compiled, ours)]
        steps = [
            model(ids[:, :1], past_key_values=cache).logits
            for model, cache in zip((compiled, ours), caches, strict=True)
        ]
    torch.testing.assert_close(*steps)
    assert isinstance(ours.model, FusedBlock)


def test_text_generation_pipeline(calls: list[int]) -> None:
    plain = build(eos_token_id=2)
    texts = ["w3 w4 w5 w6", "w8"]
    options = {"do_sample": False, "max_new_tokens": 8, "batch_size": 2}
    written = [
        pipeline("text-generation", model=model, tokenizer=words(padding_side="left"))(
            texts, **options
        )
        for model in (plain, fused(plain))
    ]
    assert written[0] == written[1]
    assert calls[0] == 4
    assert len(calls) > 1


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
