"""Drop-in modules: a Linear with gates and perhaps a LoRA inside, one with parts removed."""

from .gated_linear import FusedGatedLinear, Held
from .lora import LoRA
from .pruned_linear import PrunedLinear

__all__ = ["FusedGatedLinear", "Held", "LoRA", "PrunedLinear"]
