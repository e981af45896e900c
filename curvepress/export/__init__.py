"""Files for other runtimes.  Each writer runs what it wrote and compares it with the model before the file gets its name."""

from .latency import Quartiles, Timing, compare_latency, faster
from .onnx import Agreement, to_onnx

__all__ = ["Agreement", "Quartiles", "Timing", "compare_latency", "faster", "to_onnx"]
