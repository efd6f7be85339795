"""transformers integration; importing it lets `from_pretrained` load gated and pruned models.

>>> import tempfile
>>> import finegates.hf
>>> from finegates import gate_, prune_
>>> from transformers import AutoModel, BertConfig, BertModel
>>> model = BertModel(BertConfig(hidden_size=12, intermediate_size=8, num_hidden_layers=1))
>>> with tempfile.TemporaryDirectory() as folder:
...     prune_(gate_(model)).save_pretrained(folder)
...     type(AutoModel.from_pretrained(folder)).__name__
'BertModel'
"""

from typing import TYPE_CHECKING, Any

from .checkpoint import load_gates, save_gates
from .quantizer import FineGatesConfig, FineGatesQuantizer, register

if TYPE_CHECKING:
    from .trainer import GateCallback, GatedTrainer

register()

__all__ = [
    "FineGatesConfig",
    "FineGatesQuantizer",
    "GateCallback",
    "GatedTrainer",
    "load_gates",
    "save_gates",
]


def __getattr__(name: str) -> Any:
    """Import the Trainer, which brings accelerate and more, when it is first asked for."""
    if name in ("GateCallback", "GatedTrainer"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
