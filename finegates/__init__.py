"""finegates: learn row and column gates on frozen Linears, remove what closes, run the rest faster.

Example:
    >>> import torch
    >>> from finegates import FusedGatedLinear, GateConfig, gate_, prune_
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 2)).eval()
    >>> _ = gate_(model, GateConfig(modules=("*",), sparsity=0.4))
    >>> x = torch.randn(3, 8)
    >>> before = model(x)
    >>> torch.testing.assert_close(prune_(model)(x), before)
"""

from importlib.metadata import PackageNotFoundError, version

from .config import GateConfig
from .gates import Gate
from .nn import FusedGatedLinear, PrunedLinear
from .ops import use_backend
from .serving import optimize_for_cpu, restore_
from .surgery import GateMap, gate_, prune_

try:
    __version__ = version("finegates")
except PackageNotFoundError:
    __version__ = "0+uninstalled"

__all__ = [
    "FusedGatedLinear",
    "Gate",
    "GateConfig",
    "GateMap",
    "PrunedLinear",
    "gate_",
    "optimize_for_cpu",
    "prune_",
    "restore_",
    "use_backend",
]
