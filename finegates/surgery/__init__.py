"""Model surgery: put gates in, count what they close, take closed rows and columns out."""

from .budget import GateMap, Removal
from .controller import GateController
from .couplings import Architecture, Coupling, Side, architecture_of
from .gate import freeze_, gate_
from .prune import prune_
from .replicate import replicate_

__all__ = [
    "Architecture",
    "Coupling",
    "GateController",
    "GateMap",
    "Removal",
    "Side",
    "architecture_of",
    "freeze_",
    "gate_",
    "prune_",
    "replicate_",
]
