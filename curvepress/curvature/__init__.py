"""Curvature of a loss, exact or with error bars, on any model: usable on its own.

    from curvepress import curvature

    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    found = curvature.estimate(model, loss, batches, {n: curvature.output_channels(n, w) for n, w in weights.items()})
    found.mean["conv1.weight"], found.stderr["conv1.weight"], print(found)

Nothing here knows about pruning.
"""

from .averaging import Estimate, average, reliability, spearman, stability
from .engine import Curvature, Progress, Stop, estimate
from .estimators import ESTIMATORS
from .measures import Activation, Direction, Measure, Part, Trace, along, blocks, elements, input_channels, layer, output_channels
from .recording import only
from .setup import PRECISIONS
from .spectrum import MATRICES, Density, Eigenvalue, matrix, spectral_density, top_eigenvalue
from .workers import Sample

__all__ = [
    "ESTIMATORS",
    "MATRICES",
    "PRECISIONS",
    "Activation",
    "Curvature",
    "Density",
    "Direction",
    "Eigenvalue",
    "Estimate",
    "Measure",
    "Part",
    "Progress",
    "Sample",
    "Stop",
    "Trace",
    "along",
    "average",
    "blocks",
    "elements",
    "estimate",
    "input_channels",
    "layer",
    "matrix",
    "only",
    "output_channels",
    "reliability",
    "spearman",
    "spectral_density",
    "stability",
    "top_eigenvalue",
]
