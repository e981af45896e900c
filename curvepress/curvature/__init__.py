"""Curvature of a loss: small functions over a model, a loss and a batch.  Nothing here knows about pruning."""

from .averaging import Estimate, average
from .diagonal import gradient, hessian_diagonal

__all__ = ["Estimate", "average", "gradient", "hessian_diagonal"]
