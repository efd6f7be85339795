"""Drop-in modules: a Linear with gates, and a Linear with rows and columns removed."""

from .gated_linear import FusedGatedLinear
from .pruned_linear import PrunedLinear

__all__ = ["FusedGatedLinear", "PrunedLinear"]
