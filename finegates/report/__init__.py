"""What a run reports: counts, latencies, kept rows and columns, one table, figures and JSON."""

from .counts import (
    GATE_BINS,
    Kept,
    folder_size,
    gate_histogram,
    kept,
    model_removal,
    parameters,
    removal,
    trainable,
)
from .curves import plot_training
from .figure import plot_kept
from .layer_costs import measure_costs, write_costs
from .spread import plot_spread, spread_table
from .summary import REPORT_VERSION, Report, Row, lines, markdown, table, write_report
from .timing import Timing, cpu_name, latency, machine

__all__ = [
    "GATE_BINS",
    "REPORT_VERSION",
    "Kept",
    "Report",
    "Row",
    "Timing",
    "cpu_name",
    "folder_size",
    "gate_histogram",
    "kept",
    "latency",
    "lines",
    "machine",
    "markdown",
    "measure_costs",
    "model_removal",
    "parameters",
    "plot_kept",
    "plot_spread",
    "plot_training",
    "removal",
    "spread_table",
    "table",
    "trainable",
    "write_costs",
    "write_report",
]
