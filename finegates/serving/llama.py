"""Llama, Mistral and Qwen2: all layers of a step in one native call."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from ..ops import _cpu_blocks, decoder, eager
from ..ops.checks import transforms_run
from .fused import FusedBlock, hooked
from .growing_cache import GrowingLayer
from .packed_linear import PackedLinear

try:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY as _RECORDABLE
except ImportError:  # it is private; without it the class's own attribute says the same
    _RECORDABLE = None  # type: ignore[assignment]

_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
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


class _Constants(NamedTuple):
    """What all layers of a body have in common."""

    head: int
    scale: float
    eps: float
    activation: type[nn.Module]


class _Parts(NamedTuple):
    """What a call reads of a model body."""

    layers: _cpu_blocks.DecoderLayers
    constants: _Constants
    groups: int
    tables: dict[torch.dtype, tuple[Tensor, Tensor]]  # cos and sin of the first positions


class _FusedStack(FusedBlock):
    """A model body whose layers run in one call of `finegates.ops.decoder`.

    Served are calls with token ids or embeddings, any rope, no mask, a mask of tokens or a whole
    Boolean one, no cache, a dynamic or a static one. The rest takes the plain way: wanted hidden
    states or attentions, other caches, float16, autocast, compiling. A body whose layers have hooks
    isn't fused; hooks that come later run only there.
    """

    layer: ClassVar[type[nn.Module]]
    attention: ClassVar[type[nn.Module]]
    mlp: ClassVar[type[nn.Module]]
    norm_class: ClassVar[type[nn.Module]]

    @classmethod
    def why_not(cls, block: Any) -> str | None:
        """Return in one line why a model body can't be fused, or None."""
        config, layers = block.config, block.layers
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            return "some layers attend in a sliding window"
        if getattr(config, "sliding_window", None) and cls.plain is mistral.MistralModel:
            return "its layers attend in a sliding window"
        if not getattr(config, "is_causal", True):
            return "its attention is not causal"
        if len(layers) == 0 or type(block.norm) is not cls.norm_class:
            return "it has no layers, or another norm at the end"
        for i, layer in enumerate(layers):
            reason = cls._layer_why_not(layer, i)
            if reason is not None:
                return f"layers.{i}: {reason}"
        constants = {_constants(layer, norm) for layer in layers for norm in _norms(layer)}
        if len({*constants, _constants(layers[0], block.norm)}) > 1:
            return "its layers differ in head_dim, scaling, activation or epsilon"
        head = layers[0].self_attn.head_dim
        if head % 2 or not 0 < head <= _cpu_blocks.MOST_HEAD:
            return f"heads of {head} features"
        if type(layers[0].mlp.act_fn) not in _ACTIVATIONS:
            return f"unknown activation {type(layers[0].mlp.act_fn).__name__}"
        module = hooked(layers, block.norm)
        if module is not None:
            return f"its {module} has hooks"
        try:
            _decoder_layers(block)
        except ValueError as error:
            return str(error)
        if block.rotary_emb(torch.zeros(1, 1, 1), torch.zeros(1, 1))[0].shape[-1] != head:
            return "its rotary embedding turns a part of each head"
        return None

    @classmethod
    def _layer_why_not(cls, layer: Any, index: int) -> str | None:
        if type(layer) is not cls.layer:
            return f"it is a {type(layer).__name__}"
        parts = ((layer.self_attn, cls.attention), (layer.mlp, cls.mlp))
        norms = ((norm, cls.norm_class) for norm in _norms(layer))
        for part, kind in (*parts, *norms):
            if type(part) is not kind:
                return f"{type(part).__name__} in the place of {kind.__name__}"
        attention: Any = layer.self_attn
        if attention.layer_idx != index:
            return f"it caches as layer {attention.layer_idx}"
        for path in _LINEARS:
            linear = layer.get_submodule(path)
            if not isinstance(linear, PackedLinear) or linear.activation != "none":
                return f"{path} is not packed"
        return None

    @classmethod
    def take(cls, block: Any) -> None:
        """Fuse a body in place."""
        super().take(block)
        if _RECORDABLE is not None:  # which outputs a class can record is looked up by its name
            _RECORDABLE[block] = block._can_record_outputs

    @classmethod
    def bind(cls, block: Any) -> _Parts:
        """Return the body's weights and constants."""
        constants = _constants(block.layers[0], block.norm)
        groups = block.layers[0].self_attn.k_proj.out_features // constants.head
        return _Parts(_decoder_layers(block), constants, groups, {})

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
        parts: _Parts | None = None
        if (
            (input_ids is None) != (inputs_embeds is None)
            and all(v is None or v is False for key, v in kwargs.items() if key != "return_dict")
            and kwargs.get("return_dict", True) is not False
            and self._is_plain()
        ):
            parts = self.parts()
        if parts is not None:
            if inputs_embeds is None:
                input_ids, inputs_embeds = None, self.embed_tokens(input_ids)
            caches = self.config.use_cache if use_cache is None else use_cache
            output = self._run(
                parts, inputs_embeds, attention_mask, position_ids, past_key_values, caches
            )
            if output is not None:
                return output
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def stages(self: Any) -> list[tuple[str, tuple[str, ...]]]:
        """Return a layer's norm, q k v, attention, output, norm, gate and up, down; and so on."""
        found: list[tuple[str, tuple[str, ...]]] = []
        for i in range(len(self.layers)):
            names = [f"layers.{i}.{path}" for path in _LINEARS]
            found += [("norm", ()), ("linear", tuple(names[:3])), ("attention", ())]
            found += [("linear", (names[3],)), ("norm", ())]
            found += [("linear", tuple(names[4:6])), ("linear", (names[6],))]
        return [*found, ("norm", ())]

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
            or config.num_hidden_layers != len(self.layers)
        )

    @torch.no_grad()
    def _run(
        self: Any, parts: _Parts, x: Tensor, attention_mask: Any, positions: Tensor | None,
        cache: Any, use_cache: bool | None,
    ) -> BaseModelOutputWithPast | None:  # fmt: skip
        """Return the output, or None where the plain way has to serve."""
        layers, constants = parts.layers, parts.constants
        if x.dtype != layers.dtype or not x.is_cpu or x.requires_grad or x.numel() == 0:
            return None
        batch, queries, _ = x.shape
        if positions is not None and (
            positions.is_floating_point() or positions.shape not in ((1, queries), (batch, queries))
        ):
            return None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        shape = (batch, parts.groups, queries, constants.head)
        cached = _cached(cache, layers.count, shape, x.dtype)
        if cached is None:
            return None
        tokens = cached.past + queries
        mask = _mask(attention_mask, batch, queries, tokens)
        if mask is _UNKNOWN or (cache is None and attention_mask is None and positions is not None):
            return None
        if positions is None:
            positions = torch.arange(cached.past, tokens)[None]
        cos, sin, rows = self._rope(parts, x, positions.expand(batch, queries))
        tensors = (cos, sin, rows, cached.keys, cached.values, cached.past, mask)
        eps, scale, activation = constants.eps, constants.scale, _ACTIVATIONS[constants.activation]
        if eager.is_plain(x):
            y = _cpu_blocks.decoder(x, layers, *tensors, eps, scale, activation)
        else:
            y = decoder(x, layers.packed, layers.norms, *tensors,
                        eps=eps, scale=scale, activation=activation)  # fmt: skip
        for layer in cached.layers:
            if isinstance(layer, GrowingLayer):
                layer.advance(queries)
            else:
                layer.cumulative_length.add_(queries)
        return BaseModelOutputWithPast(last_hidden_state=y, past_key_values=cache)

    def _rope(
        self: Any, parts: _Parts, x: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return cos and sin [P, D] and each token's row in them."""
        low, high = (int(position) for position in positions.aminmax())
        most = 2 * self.config.max_position_embeddings
        if self.rotary_emb.rope_type not in _FIXED_ROPES or low < 0 or high >= most:
            cos, sin = self.rotary_emb(x, positions)
            rows = torch.arange(positions.numel()).view(positions.shape)
            return cos.flatten(0, 1), sin.flatten(0, 1), rows
        table = parts.tables.get(x.dtype)
        if table is None or len(table[0]) <= high:
            every = torch.arange(min(max(256, 2 * high), most))[None]
            cos, sin = self.rotary_emb(x, every)
            table = parts.tables[x.dtype] = (cos[0], sin[0])
        return *table, positions


class FusedLlamaModel(_FusedStack, llama.LlamaModel):
    """`LlamaModel`, see `_FusedStack`."""

    plain, layer = llama.LlamaModel, llama.LlamaDecoderLayer
    attention, mlp, norm_class = llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm


class FusedMistralModel(_FusedStack, mistral.MistralModel):
    """`MistralModel` without a sliding window, see `_FusedStack`."""

    plain, layer = mistral.MistralModel, mistral.MistralDecoderLayer
    attention, mlp, norm_class = (
        mistral.MistralAttention,
        mistral.MistralMLP,
        mistral.MistralRMSNorm,
    )


class FusedQwen2Model(_FusedStack, qwen2.Qwen2Model):
    """`Qwen2Model` without sliding windows, see `_FusedStack`."""

    plain, layer = qwen2.Qwen2Model, qwen2.Qwen2DecoderLayer
    attention, mlp, norm_class = qwen2.Qwen2Attention, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm


FUSED = {c.plain: c for c in (FusedLlamaModel, FusedMistralModel, FusedQwen2Model)}


def _decoder_layers(body: Any) -> _cpu_blocks.DecoderLayers:
    packed = [layer.get_submodule(path).packed for layer in body.layers for path in _LINEARS]
    norms = [norm.weight for layer in body.layers for norm in _norms(layer)]
    return _cpu_blocks.DecoderLayers(packed, [*norms, body.norm.weight])


def _norms(layer: Any) -> tuple[Any, Any]:
    return layer.input_layernorm, layer.post_attention_layernorm


def _constants(layer: Any, norm: Any) -> _Constants:
    attention = layer.self_attn
    return _Constants(
        attention.head_dim, attention.scaling, norm.variance_epsilon, type(layer.mlp.act_fn)
    )


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
    if type(cache) not in (DynamicCache, StaticCache):
        return None
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
        int(layer.cumulative_length) != past
        or layer.keys.shape != wanted
        or layer.values.shape != wanted
        or layer.keys.dtype != dtype
        for layer in layers
    ):
        return None
    return _Cached(
        [layer.keys for layer in layers], [layer.values for layer in layers], past, layers
    )
