"""Whole models for CPU inference: packed Linears, and blocks that run in one native call."""

from .optimize import optimize_for_cpu, restore_
from .packed_linear import PackedLinear

__all__ = ["PackedLinear", "optimize_for_cpu", "restore_"]
