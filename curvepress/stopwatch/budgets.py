"""Plans that are as fast as was asked: made by a table, measured in the runtime, and made again with the limit set right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..costs import cost
from ..latency import Table
from ..plan import Plan
from ..planner.channels import Milliseconds, milliseconds

ROUNDS = 3
TOLERANCE = 0.05
"""How far from the limit a measured latency may be, as a share of the limit."""
Search = Callable[[float], Plan]
"""The plan for a limit of latency."""
Measure = Callable[[Plan], tuple[float, float]]
"""Measured seconds of a plan's model and of the whole model, in turns."""


@dataclass(frozen=True)
class Met:
    """A plan whose latency was measured.

    ``asked``, ``predicted`` and ``measured`` are shares of the whole model's latency, or milliseconds where an absolute limit was
    asked for.  ``rounds`` is how many plans were measured.
    """

    plan: Plan
    asked: float
    predicted: float
    measured: float
    rounds: int


def met(limit: float | str, search: Search, measure: Measure, table: Table) -> Met:
    """The plan whose measured latency is nearest to the limit, and within 5 percent of it.

    Where the runtime takes longer or shorter than the table says, the limit given to the search is corrected by their ratio, at most
    twice.  A plan far below the limit is left so where no larger one is found.

    Raises:
        ValueError: if no plan measured keeps the limit; the message has the nearest.
    """
    wanted = milliseconds(limit)
    absolute = isinstance(wanted, Milliseconds)
    aim, found = wanted, list[Met]()
    for turn in range(ROUNDS):
        try:
            plan = search(aim)
        except ValueError:
            if turn:
                break
            raise
        found.append(_measured(plan, wanted, measure(plan), table, turn + 1))
        off = found[-1].measured / wanted
        if abs(off - 1) <= TOLERANCE:
            break
        aim = Milliseconds(aim / off) if absolute else min(aim / off, 1.0)
    best = min(found, key=lambda m: (m.measured > wanted * (1 + TOLERANCE), abs(m.measured - wanted)))
    if best.measured > wanted * (1 + TOLERANCE):
        said = f"{best.measured:.3g} ms" if absolute else f"{best.measured:.3f} of the original"
        raise ValueError(
            f"no plan was measured to keep the latency budget ({limit}); the nearest of {len(found)} took {said}; "
            "allow that, or measure again when the machine is quiet"
        )
    return Met(best.plan, best.asked, best.predicted, best.measured, len(found))


def _measured(plan: Plan, wanted: float, seconds: tuple[float, float], table: Table, turn: int) -> Met:
    predicted, whole = (cost(p, table).latency or 0.0 for p in (plan, Plan(plan.structure)))
    units = (1e-3, 1e-3) if isinstance(wanted, Milliseconds) else (whole, seconds[1])
    return Met(plan, float(wanted), predicted / units[0], seconds[0] / units[1], turn)
