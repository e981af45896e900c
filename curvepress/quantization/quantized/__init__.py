"""Quantized models: grids on the weights and activations of an exported graph, calibrated, trained, and lowered to integers."""

from .calibration import calibrate, observe
from .insertion import bits_of, layout, quantize, sites
from .layout import Bits, Layout, Product, Site, Weight, bits_from_json, sums_in_float, weight_scheme
from .modules import floating, switch

__all__ = [
    "Bits", "Layout", "Product", "Site", "Weight",
    "bits_from_json", "bits_of", "calibrate", "floating", "layout", "observe", "quantize", "sites", "sums_in_float",
    "switch", "weight_scheme",
]  # fmt: skip
