"""What a run reports: counts, latencies, kept rows and columns, one table, a figure and JSON."""

from .counts import (
    Kept,
    folder_size,
    kept,
    model_removal,
    parameters,
    removal,
    trainable,
)
from .figure import plot_kept
from .spread import spread_table
from .summary import REPORT_VERSION, Report, Row, markdown, table, write_report
from .timing import Timing, cpu_name, latency, machine

__all__ = [
    "REPORT_VERSION",
    "Kept",
    "Report",
    "Row",
    "Timing",
    "cpu_name",
    "folder_size",
    "kept",
    "latency",
    "machine",
    "markdown",
    "model_removal",
    "parameters",
    "plot_kept",
    "removal",
    "spread_table",
    "table",
    "trainable",
    "write_report",
]
