"""The planner's time, and how far from the exact plan it is, on chains of layers drawn at random."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from benchmarks import records
from curvepress.bitplan import Multiplication, Wiring
from curvepress.costs import cost
from curvepress.plan import Plan
from curvepress.planner.alignment import Shape
from curvepress.planner.channels import at_most
from curvepress.planner.exactly import exact
from curvepress.planner.joint import Bitwidths, choose, family, joint_problem
from curvepress.quantization.bitwidths import BitPrices, Price
from curvepress.quantization.quantized import Layout, Weight
from curvepress.scores import LOSS_UNIT, Scores
from curvepress.structure import Group, Member, Structure, TensorSpec

SIZES = (2, 4, 8, 16, 100, 1000, 10_000)
"""Numbers of groups."""
SHARES = (0.2, 0.1, 0.06)
EXACT = 100
"""Groups up to which the exact plan is looked for."""


def planner(file: Path, sizes: list[int]) -> None:
    """Measure whatever has no record in the file yet."""
    for n in sizes:
        for share in SHARES:
            for seed in range(3 if n <= EXACT else 1):
                key = {"what": "planner", "groups": n, "share": share, "seed": seed}
                print(records.once(file, key, lambda n=n, share=share, seed=seed: _planner(n, share, seed)), flush=True)


def _planner(n: int, share: float, seed: int) -> records.Record:
    given, start = synthetic(n, seed), time.process_time()
    problem = joint_problem(*given, bits=Bitwidths((2, 4, 8)), shape=Shape(multiple=4))
    found = choose(family(problem), at_most(bytes=share))
    record: records.Record = {"cpu_seconds": time.process_time() - start, "rise": found.predicted.rise}
    if n <= EXACT:
        start = time.process_time()
        best = exact(problem, {"bytes": share * cost(Plan(given[0])).bytes}, seconds=60)
        record |= {"exact": best.rise, "bound": best.bound, "exact_cpu_seconds": time.process_time() - start}
    return record


def synthetic(n: int, seed: int = 0, width: int = 16) -> tuple[Structure, Scores, BitPrices, Wiring]:
    """A chain of ``n + 1`` convolutions with ``n`` groups between them; prices over several orders of magnitude."""
    rng, names = np.random.default_rng(seed), [f"w{i}" for i in range(n + 1)]
    shapes = [((width if i < n else 10), (width if i else 3), 3, 3) for i in range(n + 1)]
    tensors = {w: TensorSpec(s, "float32", "parameter", int(rng.integers(1, 64))) for w, s in zip(names, shapes, strict=True)}
    rows = np.arange(width)[:, None]
    groups = tuple(
        Group(f"g{i}", width, "channel", (Member(names[i], 0, rows, "out"), Member(names[i + 1], 1, rows, "in"))) for i in range(n)
    )
    values = {g.name: 10 ** rng.uniform(-3, 0) * rng.lognormal(0, 1, width) for g in groups}
    steep = {w: 10 ** rng.uniform(-1, 1.5) for w in names}
    prices = {w: {b: Price(steep[w] * 4.0**-b, 0.0) for b in (2, 4, 8)} for w in names}
    wired = Wiring(tuple(Multiplication(w, tensors[w].positions, (w, "")) for w in names), dict.fromkeys(names, 0))
    scores = Scores(values, {g: np.zeros(width) for g in values}, "drawn", LOSS_UNIT, 2, seed)
    return Structure(tensors, groups), scores, BitPrices(_layout(names, tensors), prices, {}), wired


def _layout(names: list[str], tensors: dict[str, TensorSpec]) -> Layout:
    return Layout(tuple(Weight(w, tensors[w].shape, 0, 0) for w in names), (), ())
