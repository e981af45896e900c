"""Measuring latency: tables for :mod:`curvepress.latency`, whole models in turns, and plans that are as fast as was asked."""

from .budgets import Measure, Met, met
from .graphs import Case
from .layers import layers_of
from .runtimes import RUNTIMES, Runtime, machine
from .tables import cached_table, calibrated, measured_table, table_path

__all__ = [
    "RUNTIMES", "Case", "Measure", "Met", "Runtime",
    "cached_table", "calibrated", "layers_of", "machine", "measured_table", "met", "table_path",
]  # fmt: skip
