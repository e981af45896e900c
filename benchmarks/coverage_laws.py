"""curvepress on one model of the coverage table: its groups, how much can be cut, and whether pruned equals masked."""

from __future__ import annotations

import random
import resource
import sys
from collections import Counter
from math import prod
from time import process_time, time
from typing import Any

import torch
from torch import nn

from benchmarks.coverage_cases import Case, make
from benchmarks.records import Record
from curvepress.costs import cost
from curvepress.objective import call, outputs
from curvepress.plan import Plan
from curvepress.planner.alignment import Shape
from curvepress.structure import Group, Structure
from curvepress.surgery.cutting import applied
from curvepress.surgery.masking import masked_output
from curvepress.tracing.watching import trace

PLANS = 2
TOLERANCE = 1e-9
"""Of the largest output, in float64."""


ONE = "all coupled into one channel"
"""Where shuffles between groups meet other groups than before, nothing less than all can go."""


def measure(name: str) -> Record:
    """The record of a model: groups, frozen ones, the share that can be cut, and the law for random plans and the smallest one."""
    case = make(name)
    example = case.inputs(3, 0)
    start = process_time()
    structure = trace(case.model, *example)
    seconds = process_time() - start
    plans = [*(random_plan(structure, seed) for seed in range(PLANS)), aligned_plan(structure), smallest(structure)]
    outcomes = [outcome(case, plan, example) for plan in plans]
    return {
        "aligned": outcomes[-2],
        **described(structure),
        "trace_seconds": seconds,
        "tried": len(plans),
        "exact": sum(o in ("module", "graph") for o in outcomes),
        "outcomes": dict(Counter(outcomes)),
    }


def described(structure: Structure) -> Record:
    """Groups by kind, ``{kind: [groups, channels]}``, those that are frozen, and the share of parameters the smallest plan removes."""
    whole = cost(Plan(structure)).params
    kinds: dict[str, list[int]] = {}
    for group in structure.free:
        count = kinds.setdefault(group.kind, [0, 0])
        count[0], count[1] = count[0] + 1, count[1] + group.size
    frozen = [[g.name, g.size, g.frozen] for g in structure.groups if g.frozen and g.size > 1]
    frozen += [[g.name, 1, ONE] for g in structure.groups if g.kind == "channel_in_group" and g.size == 1]
    return {"params": whole, "kinds": kinds, "frozen": frozen, "cut": 1 - cost(smallest(structure)).params / whole}


def smallest(structure: Structure) -> Plan:
    """One channel of every group that may be cut."""
    return Plan(structure, {g.name: (g.size // 2,) for g in structure.free})


def random_plan(structure: Structure, seed: int) -> Plan:
    """Random channels of about two thirds of the groups that may be cut."""
    rng = random.Random(seed)

    def keep(group: Group) -> tuple[int, ...]:
        return tuple(rng.sample(range(group.size), rng.randint(1, group.size)))

    return Plan(structure, {g.name: keep(g) for g in structure.free if rng.random() < 0.67})


def aligned_plan(structure: Structure, seed: int = 0) -> Plan:
    """Random channels of all groups, the query-key and value widths of a block equal."""
    rng = random.Random(seed)
    widths = Shape(floor=0.0, aligned=True).widths(structure, {g.name: rng.randint(1, g.size) for g in structure.free})
    return Plan(structure, {g.name: tuple(rng.sample(range(g.size), widths[g.name])) for g in structure.free})


def outcome(case: Case, plan: Plan, example: tuple[Any, ...]) -> str:
    """The form of the pruned model if it computes what the masked one does on other inputs, or what went wrong."""
    try:
        made = applied(case.model, plan, *example)
        other = case.inputs(5, 1)
        apart = distance(made.model, other, masked_output(case.model, plan, other))
    except Exception as error:
        return f"refused: {type(error).__name__}: {str(error).splitlines()[0][:300]}"
    return made.form if apart <= TOLERANCE else f"WRONG by {apart:.1g}"


def distance(model: nn.Module, inputs: tuple[Any, ...], wanted: Any) -> float:
    """The largest difference of the model's outputs from the wanted ones, relative to the largest of these."""
    with torch.no_grad():
        got = outputs(call(model.eval(), inputs))
    pairs = list(zip(got, outputs(wanted), strict=True))
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs)


def large(name: str) -> Record:
    """The trace of a Llama 2 configuration of seven billion parameters on the meta device: seconds and peak memory."""
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(use_cache=False)).eval()
        ids, mask = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 1, 8, 8)  # a ready mask is not looked into
    wall, start = time(), process_time()
    structure = trace(model, ids, mask)
    seconds = {"trace_seconds": process_time() - start, "wall_seconds": time() - wall}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    sizes = sum(prod(t.shape) for t in structure.tensors.values() if t.kind == "parameter")
    return {**described(structure), "params": sizes, **seconds, "peak_gib": peak}
