"""Files for other runtimes.  Each writer runs what it wrote and compares it with the model before the file gets its name."""

from .huggingface import Written, to_huggingface
from .latency import Quartiles, Timing, compare_latency, faster
from .onnx import Agreement, to_onnx

__all__ = ["Agreement", "Quartiles", "Timing", "Written", "compare_latency", "faster", "to_huggingface", "to_onnx"]
