"""What each ATen operator does to labelled dimensions.

A rule takes the ledger, the operator's bound arguments and its result, and returns the dimensions of the result.
``@rule("name", ...)`` enters it in the table.  An operator that is not in the table freezes everything it touches and
says so: see :func:`~curvepress.tracing.operators.table.unknown`.
"""

from . import elementwise, norms, shapes, weights
from .norms import reduced
from .observing import observe
from .table import RULES, bound, name_of

__all__ = ["RULES", "bound", "elementwise", "name_of", "norms", "observe", "reduced", "shapes", "weights"]
