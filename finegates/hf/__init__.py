"""transformers integration; importing it registers the loader of gated and pruned models.

>>> import finegates.hf
>>> from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
>>> AUTO_QUANTIZER_MAPPING["finegates"].__name__
'FineGatesQuantizer'
"""

from .checkpoint import load_gates, save_gates
from .quantizer import FineGatesConfig, FineGatesQuantizer, register

register()

__all__ = ["FineGatesConfig", "FineGatesQuantizer", "load_gates", "save_gates"]
