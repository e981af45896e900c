"""The arithmetic of bits: grids, ranges, trained scales, biases; pure functions of tensors that know nothing of models."""

from .biases import bias_scale, fake_quantize_bias, fit_bias, quantize_bias
from .dynamic import fake_quantize_dynamic
from .grids import Grid, Scheme, centred, dequantize, fake_quantize, grid, quantize, spread
from .learned import fake_quantize_learned, gradient_scale, learned_grid
from .observers import Observer
from .ranges import Histogram, fit_grid, squared_error

__all__ = [
    "Grid", "Histogram", "Observer", "Scheme",
    "bias_scale", "centred", "dequantize",
    "fake_quantize", "fake_quantize_bias", "fake_quantize_dynamic", "fake_quantize_learned",
    "fit_bias", "fit_grid", "gradient_scale", "grid", "learned_grid", "quantize", "quantize_bias", "spread", "squared_error",
]  # fmt: skip
