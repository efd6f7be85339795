"""Which rows and columns can only die together, per architecture (docs/method.md).

A coupling joins a ``many`` side with ``ones`` sides over units (group g, width w):

====================  ====================  ==============  ======  =======  =====  ==========
relation              many                  ones            groups  repeats  pairs  width
====================  ====================  ==============  ======  =======  =====  ==========
MLP                   output columns        inner rows      1       1        1      inner size
SwiGLU                down columns          gate, up rows   1       1        1      inner size
value-output          output columns        value rows      kv      heads/kv 1      head size
query-key             query rows            key rows        kv      heads/kv 1      head size
query-key, rotary     query rows            key rows        kv      heads/kv 2      half head
====================  ====================  ==============  ======  =======  =====  ==========

A ``many`` element lives while its own gate is open and every ``one`` has an open element in its
unit; a ``one`` element lives while its own gate is open, the other ones' units live and some
``many`` element of the unit is open. Sides take part in one coupling only, so that one pass is the
fixpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

# Model types whose blocks compute what the table says; tests/test_couplings.py runs every one. The
# module names alone prove nothing: RoFormer's rotate queries, YOSO's normalise them, BitNet's norm
# the MLP's inner features, and all carry BERT's or Llama's names.
BERT_TYPES = ("bert", "camembert", "data2vec-text", "electra", "roberta", "xlm-roberta")
LLAMA_TYPES = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")


Axis = Literal["row", "column"]
AXES: tuple[Axis, Axis] = ("row", "column")


class Side(NamedTuple):
    """One side of one Linear: its rows (output features) or its columns (input features)."""

    module: str
    axis: Axis


class Algebra(NamedTuple):
    """How "and" and "or" combine vectors: min and max for logits, products for probabilities."""

    both: Callable[[Tensor, Tensor], Tensor]
    any_of: Callable[[Tensor, tuple[int, ...]], Tensor]


def _some(p: Tensor, dims: tuple[int, ...]) -> Tensor:
    closed = 1.0 - p
    for dim in sorted(dims, reverse=True):
        closed = closed.prod(dim)
    return 1.0 - closed


ORDER = Algebra(torch.minimum, lambda t, dims: t.amax(dims))
PROBABILITY = Algebra(torch.mul, _some)


@dataclass(frozen=True)
class Coupling:
    """Units of features that can only die together; see the module's table.

    Args:
        many: the side with ``repeats`` elements per unit and pair.
        ones: the sides with one element per unit and pair.
        groups, repeats, pairs, width: the side ``many`` viewed as a 4-D tensor.
        private: nothing else sees the features between, so that they may be made compact.
    """

    many: Side
    ones: tuple[Side, ...]
    groups: int
    repeats: int
    pairs: int
    width: int
    private: bool = False

    @property
    def sides(self) -> tuple[Side, ...]:
        """All sides, ``many`` first."""
        return (self.many, *self.ones)

    def layout(self, side: Side) -> tuple[int, int, int, int] | None:
        """Return the gate layout of a side, None when each element is a unit of its own."""
        if self.pairs == 1 and self.repeats == 1:
            return None
        return (self.groups, self.repeats if side == self.many else 1, self.pairs, self.width)

    def resolve(self, values: Mapping[Side, Tensor], algebra: Algebra) -> dict[Side, Tensor]:
        """Return each side's values after "dead when the partner is dead".

        Args:
            values: per side a vector: logits (algebra `ORDER`) or open probabilities
                (`PROBABILITY`, exact when gates are independent).
        """
        shape = (self.groups, self.repeats, self.pairs, self.width)
        many = values[self.many].view(shape)
        ones = [values[one].view(self.groups, 1, self.pairs, self.width) for one in self.ones]
        unit_many = algebra.any_of(many, (1, 2))[:, None, None, :]
        unit_ones = [algebra.any_of(one, (1, 2))[:, None, None, :] for one in ones]
        resolved = {self.many: many}
        for unit in unit_ones:
            resolved[self.many] = algebra.both(resolved[self.many], unit)
        for i, side in enumerate(self.ones):
            one = algebra.both(ones[i], unit_many)
            for j, unit in enumerate(unit_ones):
                one = one if j == i else algebra.both(one, unit)
            resolved[side] = one
        return {side: value.reshape(-1) for side, value in resolved.items()}


@dataclass(frozen=True)
class Architecture:
    """What is known of a model's blocks.

    Args:
        family: ``"bert"``, ``"llama"``, after the blocks' module names, or None for neither.
        linears: names of the attention and MLP Linears, in model order.
        couplings: see `Coupling`.
        shared_inputs: groups of column sides that read the same tensor.
    """

    family: str | None
    linears: tuple[str, ...]
    couplings: tuple[Coupling, ...]
    shared_inputs: tuple[tuple[Side, ...], ...]

    def __add__(self, other: Architecture) -> Architecture:
        return Architecture(
            self.family or other.family,
            self.linears + other.linears,
            self.couplings + other.couplings,
            self.shared_inputs + other.shared_inputs,
        )


def architecture_of(model: nn.Module) -> Architecture:
    """Find the encoder and decoder blocks of a model by their module names.

    BERT-like blocks hold ``attention.self.{query,key,value}``, ``attention.output.dense``,
    ``intermediate.dense`` and ``output.dense``; Llama-like blocks hold ``self_attn.{q,k,v,o}_proj``
    and ``mlp.{gate,up,down}_proj``. Their couplings hold for the model types in `BERT_TYPES` and
    `LLAMA_TYPES`, taken from the attention's own config or the model's. Anything else is unknown:
    gates still work, nothing is coupled.
    """
    found = Architecture(None, (), (), ())
    config = getattr(model, "config", None)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if _has(module, "attention.self.query", "intermediate.dense", "output.dense"):
            found += _bert_block(prefix, module, config)
        elif _has(module, "self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj"):
            found += _llama_block(prefix, module, config)
    return found


def _bert_block(prefix: str, block: nn.Module, config: Any) -> Architecture:
    query, key, value = (f"{prefix}attention.self.{n}" for n in ("query", "key", "value"))
    attention_output = f"{prefix}attention.output.dense"
    inner, output = f"{prefix}intermediate.dense", f"{prefix}output.dense"
    names = (query, key, value, attention_output, inner, output)
    shared = (tuple(Side(n, "column") for n in (query, key, value)),)
    attention: Any = block.get_submodule("attention.self")
    if _model_type(attention, config) not in BERT_TYPES:
        return Architecture("bert", names, (), shared)
    heads = attention.num_attention_heads
    couplings = [
        Coupling(Side(attention_output, "column"), (Side(value, "row"),), heads, 1, 1,
                 _features(attention.value, "row") // heads),
    ]  # fmt: skip
    # A relative position embedding lives in the attention module and meets queries without keys.
    if _only_linears(attention):
        couplings.append(
            Coupling(Side(query, "row"), (Side(key, "row"),), heads, 1, 1,
                     _features(attention.query, "row") // heads)
        )  # fmt: skip
    if _fixes_zero(block.get_submodule("intermediate").intermediate_act_fn):
        couplings.append(_mlp(output, (inner,), block.get_submodule("intermediate.dense")))
    return Architecture("bert", names, tuple(couplings), shared)


def _llama_block(prefix: str, block: nn.Module, config: Any) -> Architecture:
    query, key, value, out = (f"{prefix}self_attn.{n}_proj" for n in ("q", "k", "v", "o"))
    gate, up, down = (f"{prefix}mlp.{n}_proj" for n in ("gate", "up", "down"))
    names = (query, key, value, out, gate, up, down)
    shared = (
        tuple(Side(n, "column") for n in (query, key, value)),
        tuple(Side(n, "column") for n in (gate, up)),
    )
    attention: Any = block.get_submodule("self_attn")
    if _model_type(attention, config) not in LLAMA_TYPES:
        return Architecture("llama", names, (), shared)
    head = attention.head_dim
    heads = _features(attention.q_proj, "row") // head
    groups = _features(attention.k_proj, "row") // head
    couplings = [
        Coupling(Side(out, "column"), (Side(value, "row"),), groups, heads // groups, 1, head)
    ]
    # The rotary embedding turns the pairs (d, d + head / 2). Per-head norms of queries or keys, as
    # Qwen3 has, would see the removed features.
    rope = getattr(getattr(attention, "config", config), "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", 1.0) == 1.0 and _only_linears(attention):
        couplings.append(
            Coupling(Side(query, "row"), (Side(key, "row"),), groups, heads // groups, 2, head // 2)
        )
    if _fixes_zero(block.get_submodule("mlp").act_fn):
        couplings.append(_mlp(down, (gate, up), block.get_submodule("mlp.up_proj")))
    return Architecture("llama", names, tuple(couplings), shared)


def _mlp(output: str, inner: Iterable[str], inner_linear: Any) -> Coupling:
    ones = tuple(Side(name, "row") for name in inner)
    width = _features(inner_linear, "row")
    return Coupling(Side(output, "column"), ones, 1, 1, 1, width, private=True)


def _model_type(attention: nn.Module, config: Any) -> str | None:
    model_type: str | None = getattr(getattr(attention, "config", config), "model_type", None)
    return model_type


def _features(linear: Any, axis: str) -> int:
    features: int = linear.out_features if axis == "row" else linear.in_features
    return features


def _has(module: nn.Module, *paths: str) -> bool:
    try:
        return all(hasattr(module.get_submodule(path), "in_features") for path in paths)
    except AttributeError:
        return False


def _only_linears(attention: nn.Module) -> bool:
    children = attention.children()
    return all(hasattr(child, "in_features") or not any(True for _ in child.parameters())
               for child in children)  # fmt: skip


def _fixes_zero(activation: Any) -> bool:
    return bool(activation(torch.zeros(1, device="cpu")) == 0)
