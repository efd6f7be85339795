"""The layers of BERT and RoBERTa as one native call each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention
from transformers.models.roberta.modeling_roberta import RobertaLayer, RobertaSelfAttention

from ..ops import _cpu_blocks, encoder_layer
from ..ops.checks import autocasts
from .fused import FusedBlock, hooked
from .packed_linear import PackedLinear

_SELF_ATTENTION = (BertSelfAttention, RobertaSelfAttention)
_ATTENTION = ("eager", "sdpa")
_ACTIVATIONS = {
    GELUActivation: "gelu",
    NewGELUActivation: "gelu_tanh",
    GELUTanh: "gelu_tanh",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}
_DTYPES = (torch.float32, torch.bfloat16)
_MASK_DTYPES = (torch.bool, *_DTYPES)


class Parts(NamedTuple):
    """What one call reads of the layer."""

    config: Any
    linears: tuple[PackedLinear, ...]
    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    heads: int
    head_size: int
    scale: float
    activation: str


class FusedEncoderLayer(FusedBlock):
    """`BertLayer` or `RobertaLayer` as `ops.encoder_layer`; its own forward for everything else.

    That is: caches, cross-attention, attention weights as output, masks that are no tensor of four
    dimensions, other attention implementations than eager and sdpa, autocast, and float16. A layer
    whose modules have hooks isn't fused; hooks that come later run only there.
    """

    @classmethod
    def why_not(cls, block: Any) -> str | None:
        """Return why this layer can't be one call, or None."""
        attention = block.attention
        if block.is_decoder or block.add_cross_attention:
            return "it is a decoder"
        if type(attention.self) not in _SELF_ATTENTION:
            return f"its attention is {type(attention.self).__name__}"
        if type(block.intermediate.intermediate_act_fn) not in _ACTIVATIONS:
            return f"its activation is {type(block.intermediate.intermediate_act_fn).__name__}"
        for layer in _linears(block):
            if not isinstance(layer, PackedLinear) or layer.activation != "none":
                return "one of its Linears isn't packed"
        width = attention.self.num_attention_heads * attention.self.attention_head_size
        if not 0 < attention.self.attention_head_size <= _cpu_blocks.MOST_HEAD:
            return f"heads of {attention.self.attention_head_size} features"
        if any(layer.out_features != width for layer in _linears(block)[:3]):
            return f"its query, key or value doesn't have {width} features"
        for norm in _norms(block):
            if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
                return "one of its norms isn't a LayerNorm with weight and bias"
        module = hooked(*block.children())
        return None if module is None else f"its {module} has hooks"

    @classmethod
    def bind(cls, block: Any) -> Parts:
        """Return the layer's parts and constants."""
        attention = block.attention.self
        return Parts(
            attention.config,
            _linears(block),
            _norms(block),
            attention.num_attention_heads,
            attention.attention_head_size,
            attention.scaling,
            _ACTIVATIONS[type(block.intermediate.intermediate_act_fn)],
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map hidden states [B, S, K] as the layer's own forward does."""
        parts: Parts | None = self.parts()
        if (
            parts is not None
            and encoder_hidden_states is None
            and past_key_values is None
            and hidden_states.dtype in _DTYPES
            and not kwargs.get("output_attentions", parts.config.output_attentions)
            and parts.config._attn_implementation in _ATTENTION
            and (
                attention_mask is None
                or isinstance(attention_mask, Tensor)
                and attention_mask.dim() == 4
                and attention_mask.dtype in _MASK_DTYPES
            )
            and not autocasts(hidden_states)
            and not (hidden_states.requires_grad and torch.is_grad_enabled())
        ):
            norms: list[Any] = [
                norm._parameters[name] for norm in parts.norms for name in ("weight", "bias")
            ]
            if all(operand.dtype is hidden_states.dtype for operand in norms):
                packed: list[Any] = [layer._buffers["packed"] for layer in parts.linears]
                return encoder_layer(
                    hidden_states,
                    packed,
                    norms,
                    [norm.eps for norm in parts.norms],
                    parts.heads,
                    parts.head_size,
                    parts.scale,
                    parts.activation,
                    attention_mask,
                )
        y: Tensor = super().forward(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            **kwargs,
        )
        return y


class FusedBertLayer(FusedEncoderLayer, BertLayer):
    """A `BertLayer` as one native call."""

    plain = BertLayer


class FusedRobertaLayer(FusedEncoderLayer, RobertaLayer):
    """A `RobertaLayer` as one native call."""

    plain = RobertaLayer


FUSED = {BertLayer: FusedBertLayer, RobertaLayer: FusedRobertaLayer}


def _linears(block: Any) -> tuple[Any, ...]:
    """Return query, key, value, output, up and down."""
    attention = block.attention
    heads = attention.self
    ends = (attention.output.dense, block.intermediate.dense, block.output.dense)
    return (heads.query, heads.key, heads.value, *ends)


def _norms(block: Any) -> tuple[nn.LayerNorm, nn.LayerNorm]:
    return (block.attention.output.LayerNorm, block.output.LayerNorm)
