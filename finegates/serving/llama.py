"""Llama, Mistral and Qwen2: all layers of a step in one native call."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ..ops import _cpu
from ..ops.checks import transforms_run
from .fused import FusedBlock
from .growing_cache import GrowingLayer
from .packed_linear import PackedLinear

_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm")
_ACTIVATIONS = {
    SiLUActivation: "silu",
    nn.SiLU: "silu",
    GELUActivation: "gelu",
    GELUTanh: "gelu_tanh",
}
# Rotary embeddings whose angles depend on the position alone.
_FIXED_ROPES = ("default", "linear", "llama3", "yarn")
_MASKLESS = ("sdpa", "eager")  # attention that sees what the 2-D mask and causality say


class _Cached(NamedTuple):
    """Where a call's keys and values go."""

    keys: list[Tensor]
    values: list[Tensor]
    past: int
    layers: list[Any]  # of the cache, to be told afterwards


class _Bound:
    """Constants of a model body, and what is made from its weights on first use."""

    def __init__(self, body: Any) -> None:
        attention = body.layers[0].self_attn
        self.head = attention.head_dim
        self.groups = attention.k_proj.out_features // self.head
        self.scale = attention.scaling
        self.eps = body.norm.variance_epsilon
        self.activation = _ACTIVATIONS[type(body.layers[0].mlp.act_fn)]
        self.forget()

    def forget(self) -> None:
        """Let go of what was made from weights that have moved."""
        self.layers: _cpu.DecoderLayers | None = None
        self.rope: tuple[Tensor, Tensor] | None = None


class _FusedStack(FusedBlock):
    """A model body whose layers run in one call of `finegates.ops.decoder`.

    Served are calls with token ids or embeddings, any rope, no mask, a mask of tokens or a whole
    Boolean one, no cache, a dynamic or a static one. The rest takes the plain way: wanted hidden
    states or attentions, other caches, float16, autocast, compiling. Hooks on modules inside the
    body run only there.
    """

    layer: ClassVar[type[nn.Module]]

    @classmethod
    def why_not(cls, block: Any) -> str | None:
        """Return in one line why a model body can't be fused, or None."""
        config, layers = block.config, block.layers
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            return "some layers attend in a sliding window"
        if getattr(config, "sliding_window", None) and cls.plain is MistralModel:
            return "its layers attend in a sliding window"
        if not getattr(config, "is_causal", True):
            return "its attention is not causal"
        head = layers[0].self_attn.head_dim
        if head % 2 or head > _cpu.MOST_HEAD:
            return f"heads of {head} features"
        if type(layers[0].mlp.act_fn) not in _ACTIVATIONS:
            return f"unknown activation {type(layers[0].mlp.act_fn).__name__}"
        for name, layer in layers.named_children():
            if type(layer) is not cls.layer:
                return f"layers.{name} is a {type(layer).__name__}"
            for path in _LINEARS:
                linear = layer.get_submodule(path)
                if not isinstance(linear, PackedLinear) or linear.activation != "none":
                    return f"layers.{name}.{path} is not packed"
        try:
            _decoder_layers(block)
        except ValueError as error:
            return str(error)
        if block.rotary_emb(block.norm.weight[None, None], torch.zeros(1, 1))[0].shape[-1] != head:
            return "its rotary embedding turns a part of each head"
        return None

    @classmethod
    def bind(cls, block: Any) -> _Bound:
        """Return the body's constants."""
        return _Bound(block)

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what the plain forward returns, from one native call where that serves."""
        output = None
        if (
            (input_ids is None) != (inputs_embeds is None)
            and not any(value for key, value in kwargs.items() if key != "return_dict")
            and kwargs.get("return_dict", True) is not False
            and self._is_plain()
        ):
            x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            use_cache = self.config.use_cache if use_cache is None else use_cache
            output = self._run(x, attention_mask, position_ids, past_key_values, use_cache)
        if output is not None:
            return output
        # Which outputs a class can record is known by its name.
        _CAN_RECORD_REGISTRY[self] = self._can_record_outputs
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _is_plain(self: Any) -> bool:
        config = self.config
        return not (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            or torch.is_autocast_enabled("cpu")
            or transforms_run()
            or config.output_hidden_states
            or getattr(config, "output_attentions", False)
            or config.return_dict is False
            or config._attn_implementation not in _MASKLESS
        )

    @torch.no_grad()
    def _run(
        self: Any, x: Tensor, attention_mask: Any, positions: Tensor | None, cache: Any,
        use_cache: bool | None,
    ) -> BaseModelOutputWithPast | None:  # fmt: skip
        """Return the output, or None where the plain way has to serve."""
        bound = self._bound
        layers = bound.layers
        if layers is None:
            layers = bound.layers = _decoder_layers(self)
        if x.dtype != layers.dtype or not x.is_cpu or x.requires_grad or x.numel() == 0:
            return None
        batch, queries, _ = x.shape
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        shape = (batch, bound.groups, queries, bound.head)
        cached = _cached(cache, layers.count, shape, x.dtype)
        if cached is None:
            return None
        tokens = cached.past + queries
        mask = _mask(attention_mask, batch, queries, tokens)
        if mask is _UNKNOWN or (cache is None and attention_mask is None and positions is not None):
            return None
        if positions is None:
            positions = torch.arange(cached.past, tokens)[None]
        elif positions.dim() != 2:
            return None
        positions = positions.expand(batch, queries)
        cos, sin, rows = self._rope(x, positions)
        y = _cpu.decoder(
            x, layers, cos, sin, rows, cached.keys, cached.values, cached.past, mask,
            bound.eps, bound.scale, bound.activation,
        )  # fmt: skip
        for layer in cached.layers:
            if isinstance(layer, GrowingLayer):
                layer.advance(queries)
            else:
                layer.cumulative_length.add_(queries)
        return BaseModelOutputWithPast(last_hidden_state=y, past_key_values=cache)

    def _rope(self: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return cos and sin [P, D] and each token's row in them."""
        if self.rotary_emb.rope_type not in _FIXED_ROPES:
            cos, sin = self.rotary_emb(x, positions)
            rows = torch.arange(positions.numel()).view(positions.shape)
            return cos.flatten(0, 1), sin.flatten(0, 1), rows
        most = int(positions.max())
        table: Any = self._bound.rope
        if table is None or table[0].dtype != x.dtype or len(table[0]) <= most:
            every = torch.arange(max(256, 2 * most))[None]
            cos, sin = self.rotary_emb(x, every)
            table = self._bound.rope = (cos[0], sin[0])
        return *table, positions

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        """Forget the addresses of what moves."""
        self._bound.forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self: Any, *args: Any) -> None:
        self._bound.forget()
        super()._load_from_state_dict(*args)


class FusedLlamaModel(_FusedStack, LlamaModel):  # type: ignore[no-untyped-call]
    """`LlamaModel`, see `_FusedStack`."""

    plain, layer = LlamaModel, LlamaDecoderLayer


class FusedMistralModel(_FusedStack, MistralModel):  # type: ignore[no-untyped-call]
    """`MistralModel` without a sliding window, see `_FusedStack`."""

    plain, layer = MistralModel, MistralDecoderLayer


class FusedQwen2Model(_FusedStack, Qwen2Model):  # type: ignore[no-untyped-call]
    """`Qwen2Model` without sliding windows, see `_FusedStack`."""

    plain, layer = Qwen2Model, Qwen2DecoderLayer


FUSED = {c.plain: c for c in (FusedLlamaModel, FusedMistralModel, FusedQwen2Model)}


def _decoder_layers(body: Any) -> _cpu.DecoderLayers:
    packed = [layer.get_submodule(path).packed for layer in body.layers for path in _LINEARS]
    norms = [layer.get_submodule(name).weight for layer in body.layers for name in _NORMS]
    return _cpu.DecoderLayers(packed, [*norms, body.norm.weight])


_UNKNOWN = object()


def _mask(mask: Any, batch: int, queries: int, tokens: int) -> Any:
    """Return the decoder's mask, None where causality says it all, or `_UNKNOWN`."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape[-1] < tokens:
        return _UNKNOWN
    if mask.dim() == 2 and mask.shape[0] == batch:
        mask = mask[:, :tokens].to(torch.bool)
        return None if bool(mask.all()) else mask
    if (
        mask.dim() == 4
        and mask.dtype == torch.bool
        and mask.shape[0] in (1, batch)
        and mask.shape[1:3] == (1, queries)
    ):
        return mask[:, 0].expand(batch, -1, -1)
    return _UNKNOWN


def _cached(
    cache: Any, count: int, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> _Cached | None:
    """Return room for new keys and values [B, G, S, D], None in a cache of an unknown kind."""
    if cache is None:  # nobody reads them again, so that all layers may share
        keys, values = torch.empty(2, *shape, dtype=dtype)
        return _Cached([keys] * count, [values] * count, 0, [])
    if (
        type(cache) is DynamicCache
        and not cache.layers
        and cache.layer_class_to_replicate is DynamicLayer
    ):
        cache.layers.extend(
            DynamicLayer()  # type: ignore[no-untyped-call]
            for _ in range(count)
        )
    layers = cache.layers
    if len(layers) != count or cache.offloading:
        return None
    if all(type(layer) is StaticLayer for layer in layers):
        return _static(layers, shape, dtype)
    if not all(type(layer) in (DynamicLayer, GrowingLayer) for layer in layers):
        return None
    keys, values = [], []
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layer = layers[i] = GrowingLayer(layer)
        buffers = layer.extend(shape, dtype)
        if buffers is None:
            return None
        keys.append(buffers[0])
        values.append(buffers[1])
    past = layers[0].get_seq_length()
    if any(layer.get_seq_length() != past for layer in layers):
        return None
    if any(key.shape != keys[0].shape for key in keys):
        return None
    return _Cached(keys, values, past, layers)


def _static(
    layers: list[Any], shape: tuple[int, int, int, int], dtype: torch.dtype
) -> _Cached | None:
    batch, groups, queries, head = shape
    for layer in layers:
        if not layer.is_initialized:
            states = torch.empty(shape, dtype=dtype)
            layer.lazy_initialization(states, states)
    past = int(layers[0].cumulative_length)
    wanted = (batch, groups, layers[0].max_cache_len, head)
    if past + queries > wanted[2] or any(
        layer.keys.shape != wanted or layer.values.shape != wanted or layer.keys.dtype != dtype
        for layer in layers
    ):
        return None
    return _Cached(
        [layer.keys for layer in layers], [layer.values for layer in layers], past, layers
    )
