"""curvepress: make trained networks smaller and faster, guided by the curvature of their loss.

structure = trace(model, x)                                       # which dimensions must change together
scores    = score(model, loss, batches, structure)                # what removing each channel is predicted to cost
plan      = search(structure, scores, at_most(params=0.5))        # the gentlest plan that fits the budget
small     = repair(apply(model, plan), model, batches, plan).model  # what survives takes over what was lost
small     = fit(small, loss, train, epochs=3, lr=0.01).model
save(small, "small.safetensors")                                  # and back: restore(fresh_model, plan, "small.safetensors")
"""

from .costs import Cost, cost
from .export import to_onnx
from .plan import Plan
from .planner.channels import at_most, search
from .repairing.sequential import repair
from .runs.artifacts import restore, save
from .scores import Scores, score
from .structure import Structure
from .surgery.cutting import apply
from .tracing.watching import trace
from .training.batchnorm import reestimate
from .training.fitting import fit

__all__ = [
    "Cost", "Plan", "Scores", "Structure",
    "apply", "at_most", "cost", "fit", "reestimate", "repair", "restore", "save", "score", "search", "to_onnx", "trace",
]  # fmt: skip
