"""The integer programs of HAWQ-V3: the solver of bits reproduces the published choices, and beats the one that is not the best.

Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML 2021 (arXiv:2011.10680).  Layers and their figures are those published with
the paper; the choices are read from the folder named in CURVEPRESS_RESEARCH.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curvepress.quantization.allocation import _limit_bops, _limit_bytes, _program, _solved
from curvepress.quantization.bitwidths import BitPrices, Price
from curvepress.quantization.quantized import Layout, Product, Site, Weight

LAYERS = json.loads((Path(__file__).parent / "hawqv3_layers.json").read_text())
FOLDER = os.environ.get("CURVEPRESS_RESEARCH")
FILE = Path(FOLDER or "") / "hawqv3_ilp_fixture.json"
CASES: list[dict[str, Any]] = json.loads(FILE.read_text()) if FOLDER and FILE.exists() else []
BITS = (4, 8)


def rises(case: dict[str, Any]) -> np.ndarray:
    """Omega of every layer at 4 and at 8 bits."""
    layers = LAYERS[case["model"]]
    return np.array([np.multiply(layers["Hutchinson_trace"], layers[f"delta_weights_{b}bit_square"]) for b in BITS])


def tied(case: dict[str, Any]) -> list[list[int]]:
    """Layers that have the same bits, each list by its first."""
    pairs = dict(case["tied"])
    return [[n, *([pairs[n]] if n in pairs else [])] for n in range(len(case["bits"])) if n not in pairs.values()]


def prices(case: dict[str, Any]) -> BitPrices:
    """Layers as weights where sizes count; as a tensor times itself where bit operations do, for its bits are those of both factors."""
    layers, omega, units = LAYERS[case["model"]], rises(case), tied(case)
    by_unit = {f"u{u[0]}": {b: Price(float(omega[i, u].sum()), 0.0) for i, b in enumerate(BITS)} for u in units}
    if case["constraint"] == "bops":
        sites = tuple(Site(n, "product", (1,), 1, 0, ()) for n in by_unit)
        products = tuple(Product(f"u{u[0]}", "matmul", None, (f"u{u[0]}",), int(sum(layers["bops"][n] for n in u))) for u in units)
        return BitPrices(Layout((), sites, products), {}, by_unit)
    weights = tuple(Weight(f"u{u[0]}", (int(sum(layers["parameters"][n] for n in u)),), 0, 0) for u in units)
    return BitPrices(Layout(weights, (), ()), by_unit, {})


def limit(case: dict[str, Any], low: float, high: float) -> float:
    return low + (high - low) * case["alpha"]


@pytest.mark.skipif(not CASES, reason="CURVEPRESS_RESEARCH names no folder with hawqv3_ilp_fixture.json")
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['model']}-{c['constraint']}-{c['alpha']}")
def test_the_published_choices_are_found(case: dict[str, Any]) -> None:
    layers, given = LAYERS[case["model"]], prices(case)
    program = _program(given, None, BITS)
    if case["constraint"] == "modelsize":
        total = sum(layers["parameters"])
        _limit_bytes(program, given, limit(case, total / 2, total))
    elif case["constraint"] == "bops":
        total = sum(layers["bops"])
        _limit_bops(program, given, limit(case, 16 * total, 64 * total))
    else:
        costs = {b: np.array(layers[f"latency_int{b}"]) for b in BITS}
        terms = {
            i: float(costs[b][next(u for u in tied(case) if f"u{u[0]}" == name)].sum()) for i, (_, name, b) in enumerate(program.options)
        }
        program.rows.append((terms, -np.inf, limit(case, costs[4].sum(), costs[8].sum())))
    bits = _solved(program, given)
    chosen = {**bits.weights, **bits.sites}
    found = np.array([next(chosen[f"u{u[0]}"] for u in tied(case) if n in u) for n in range(len(case["bits"]))])
    omega = rises(case)
    assert float(np.where(found == 4, omega[0], omega[1]).sum()) == pytest.approx(case["omega"], rel=1e-9)
    assert found.tolist() == case["bits"]


def test_all_cases_are_there() -> None:
    if not CASES:
        pytest.skip("CURVEPRESS_RESEARCH names no folder with hawqv3_ilp_fixture.json")
    assert len(CASES) == 18 and sum(c["equals_shipped"] for c in CASES) == 17
