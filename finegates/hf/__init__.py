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

from .checkpoint import load_gates, save_gates
from .quantizer import FineGatesConfig, FineGatesQuantizer, register

register()

__all__ = ["FineGatesConfig", "FineGatesQuantizer", "load_gates", "save_gates"]
