"""The choice of bits: equal to the best of all choices, looked at one by one."""

import itertools
import json
import os
import random
from dataclasses import replace

import pytest

from curvepress import solver
from curvepress.quantization.allocation import Allocation, allocate, allocation, refuse_unrunnable, runnable, uniform
from curvepress.quantization.bitwidths import BitPrices, Price, prices_from_dict, prices_to_dict
from curvepress.quantization.packing import packed_size
from curvepress.quantization.pareto import frontier
from curvepress.quantization.quantized import Bits, Layout, Product, Site, Weight, bits_from_json

WIDTHS = (2, 3, 4, 8)
ACTIVATIONS = (4, 8)


def made(seed: int, widths: tuple[int, ...] = WIDTHS, *, unpriced: tuple[str, ...] = ()) -> BitPrices:
    """Two convolutions, a product of two activations, one of a tensor with itself, and a tensor that a sum and a product read."""
    draw = random.Random(seed)
    weights = tuple(Weight(n, (draw.randint(1, 9), draw.randint(1, 40)), 0, 0) for n in ("a", "b", "c"))
    sites = (
        Site("x", "product", (4,), 4, 0, ("a",)), Site("y", "sum", (4,), 4, 0, ("b",)), Site("y.read", "product", (4,), 4, 0, ("b",)),
        Site("z", "product", (4,), 4, 0, ()),
    )  # fmt: skip
    products = (
        Product("a", "conv2d", "a", ("x",), draw.randint(1, 999)), Product("b", "linear", "b", ("y.read",), draw.randint(1, 999)),
        Product("xz", "matmul", None, ("x", "z"), draw.randint(1, 999)), Product("zz", "matmul", None, ("z",), draw.randint(1, 999)),
        Product("c", "embedding", "c", (), 0), Product("lost", "conv2d", None, (), 7),
    )  # fmt: skip
    layout = Layout(weights, sites, products, {"lost": "its weight is computed, not stored"})

    gone = {*unpriced, *(s.name for s in sites if s.role == "product" and s.weights and set(s.weights) <= set(unpriced))}

    def priced(names: list[str]) -> dict[str, dict[int, Price]]:
        scale = {n: 10 ** draw.uniform(-6, 0) for n in names if n not in gone}
        return {n: {b: Price(s * 4.0**-b * draw.uniform(0.5, 2), s / 10) for b in widths} for n, s in scale.items()}

    return BitPrices(layout, priced([w.name for w in weights]), priced([s.name for s in sites]), "drawn")


def everything(
    prices: BitPrices, allowed: dict[str, tuple[int, ...]] | None = None, activations: tuple[int, ...] = ACTIVATIONS
) -> list[Allocation]:
    """All choices there are."""
    weights, sites = list(prices.weights), [s.name for s in prices.layout.sites if s.name in prices.sites and s.role == "product"]
    found = []
    for ws in itertools.product(*((allowed or {}).get(w, tuple(prices.weights[w])) for w in weights)):
        for ss in itertools.product(activations, repeat=len(sites)):
            own = {w.name: None for w in prices.layout.weights} | dict(zip(weights, ws, strict=True))
            at = {s.name: (8 if s.name in prices.sites else None) for s in prices.layout.sites} | dict(zip(sites, ss, strict=True))
            found.append(allocation(prices, Bits(own, at)))
    return found


def best(choices: list[Allocation], **limits: float) -> float:
    return min(c.rise for c in choices if all(getattr(c, k) <= v for k, v in limits.items()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("unpriced", [(), ("b", "x")])
def test_the_allocation_is_the_best_of_all_choices_under_every_budget(seed: int, unpriced: tuple[str, ...]):
    prices = made(seed, unpriced=unpriced)
    choices = everything(prices)
    draw = random.Random(seed)
    for _ in range(6):
        one, other = draw.choice(choices), draw.choice(choices)
        for limits in (
            {"bytes": one.bytes},
            {"average": one.average},
            {"bops": one.bops},
            {"bytes": one.bytes, "bops": max(one.bops, other.bops)},
        ):
            found = allocate(prices, activations=ACTIVATIONS, **limits)
            assert all(getattr(found, k) <= v for k, v in limits.items())
            assert found.rise == pytest.approx(best(choices, **limits), rel=1e-5)
            assert found == allocation(prices, found.bits)


@pytest.mark.parametrize("seed", range(4))
def test_within_a_rise_of_the_loss_the_fewest_bytes_are_taken(seed: int):
    prices = made(seed)
    choices = everything(prices)
    for limits in ({"rise": random.Random(seed).choice(choices).rise * 1.001}, {"rise": max(c.rise for c in choices), "average": 5}):
        found = allocate(prices, activations=ACTIVATIONS, **limits)
        kept = [c for c in choices if all(getattr(c, k) <= v for k, v in limits.items())]
        assert found.bytes == min(c.bytes for c in kept)
        assert found.rise == pytest.approx(best(kept, bytes=found.bytes), rel=1e-5)
    with pytest.raises(ValueError, match="and the most of them raise the loss by"):
        allocate(prices, rise=min(c.rise for c in choices) / 2)
    with pytest.raises(ValueError, match="below a number above 0, got -1"):
        allocate(prices, rise=-1)


@pytest.mark.parametrize("unpriced", [(), ("b", "x")])
def test_the_frontier_of_bit_operations_is_all_that_nothing_beats(unpriced: tuple[str, ...]):
    prices = made(4, unpriced=unpriced)
    choices = everything(prices, activations=(8,))
    wanted = {c.bops: c.rise for c in choices if not any(o.bops <= c.bops and o.rise < c.rise for o in choices)}
    found = frontier(prices, cost="bops")
    assert {f.bops: f.rise for f in found} == pytest.approx(dict(sorted(wanted.items())))
    with pytest.raises(ValueError, match="bytes or bops against the predicted rise, got 'seconds'"):
        frontier(prices, cost="seconds")


@pytest.mark.parametrize("seed", range(3))
def test_the_frontier_is_all_that_nothing_beats(seed: int):
    prices = made(seed)
    choices = everything(prices, activations=(8,))
    wanted = sorted(
        {
            (c.bytes, c.rise)
            for c in choices
            if not any((o.bytes <= c.bytes and o.rise < c.rise) or (o.bytes < c.bytes and o.rise <= c.rise) for o in choices)
        }
    )
    found = frontier(prices)
    assert [f.bytes for f in found] == [b for b, _ in wanted]
    assert [f.rise for f in found] == pytest.approx([r for _, r in wanted])
    for point in found:
        assert allocate(prices, bytes=point.bytes).rise == pytest.approx(point.rise, rel=1e-5)


def test_of_equal_choices_the_frontier_holds_the_smallest():
    prices = made(5)
    flat = {n: dict.fromkeys(WIDTHS, Price(0.5, 0.1)) for n in prices.weights}
    found = frontier(BitPrices(prices.layout, flat, prices.sites))
    assert [f.bits.weights for f in found] == [dict.fromkeys("abc", 2)]


def test_a_read_of_as_many_bits_as_its_tensor_is_free_for_the_solver_too():
    prices = made(6)
    ready = {b: Price(0.0, 0.0) for b in WIDTHS}
    sites = {"x": {**ready, 4: Price(0.5, 0)}, "y": ready, "y.read": {**ready, 4: Price(1.0, 0), 8: Price(0.9, 0)}, "z": ready}
    products = (Product("a", "conv2d", "a", ("x",), 10), Product("b", "linear", "b", ("y.read",), 10))
    layout = Layout(prices.layout.weights, prices.layout.sites, products)
    prices = BitPrices(layout, {n: {8: Price(0.0, 0.0)} for n in "abc"}, sites)
    found = allocate(prices, bops=10 * 8 * (4 + 8), activations=ACTIVATIONS)
    assert (found.bits.sites["x"], found.bits.sites["y.read"], found.rise) == (4, 8, 0.5)


def test_a_looser_budget_never_predicts_a_larger_rise():
    prices = made(7)
    for name in ("bytes", "bops"):
        points = sorted({getattr(c, name) for c in everything(prices)})
        rises = [allocate(prices, activations=ACTIVATIONS, **{name: p}).rise for p in points[:: max(1, len(points) // 40)]]
        assert all(a >= b * (1 - 1e-5) for a, b in itertools.pairwise(rises))


def test_costs_by_hand():
    prices = made(0, unpriced=("b",))
    a, b, c = (w.size for w in prices.layout.weights)
    macs = {p.name: p.macs for p in prices.layout.products}
    found = allocation(prices, Bits({"a": 3, "b": None, "c": 8}, {"x": 4, "y": 8, "y.read": 8, "z": 8}))
    assert found.bytes == packed_size(a, 3) + 4 * b + c
    assert found.average == pytest.approx((3 * a + 32 * b + 8 * c) / (a + b + c))
    assert found.bops == macs["a"] * 12 + macs["b"] * 32 * 8 + macs["xz"] * 32 + macs["zz"] * 64 + 7 * 32 * 32
    taken = [prices.weights["a"][3], prices.weights["c"][8], prices.sites["x"][4], prices.sites["y"][8], prices.sites["z"][8]]
    assert found.rise == pytest.approx(sum(p.rise for p in taken))
    assert found.stderr == pytest.approx(sum(p.stderr**2 for p in taken) ** 0.5)


@pytest.mark.parametrize(("whole", "read", "costs"), [(8, 8, False), (8, 4, True), (4, 4, False), (4, 8, False), (None, 8, True)])
def test_a_read_has_a_price_only_where_it_makes_a_difference(whole: int | None, read: int, costs: bool):
    prices = made(1)
    there, gone = (allocation(prices, Bits({}, {"y": whole, "y.read": r})).rise for r in (read, None))
    assert there - gone == pytest.approx(prices.sites["y.read"][read].rise * costs)


def test_activations_that_no_integer_product_reads_or_makes_cost_nothing():
    prices = made(1)
    apart = [allocation(prices, Bits({"a": None}, {"x": b})).rise for b in (None, 4)]
    assert apart[0] == apart[1]


def test_uniform_bits_are_the_same_for_all_that_have_prices():
    prices = made(2, unpriced=("b", "z"))
    found = uniform(prices, 3, 4).bits
    assert found.weights == {"a": 3, "b": None, "c": 3} and found.sites == {"x": 4, "y": 8, "y.read": None, "z": None}


def test_targets_allow_what_they_run():
    layout = made(0).layout
    assert runnable(layout, "storage") == dict.fromkeys("abc", (2, 3, 4, 5, 6, 7, 8))
    assert runnable(layout, "onnxruntime") == {"a": (8,), "b": (4, 8), "c": (8,)}
    with pytest.raises(ValueError, match="'gpu' is unknown; choose one of storage, onnxruntime"):
        runnable(layout, "gpu")
    found = allocate(made(0), average=7.9, weights=runnable(layout, "onnxruntime"))
    assert (found.bits.weights["a"], found.bits.weights["c"]) == (8, 8)
    refuse_unrunnable(layout, "onnxruntime", found.bits)
    with pytest.raises(ValueError, match="a has 4 bits, for which onnxruntime has no kernel, only for 8; .* storage"):
        refuse_unrunnable(layout, "onnxruntime", Bits({"b": 4, "c": None}, weight=4))


def test_what_cannot_be_met_is_refused_with_the_least_that_can():
    prices = made(3)
    least = min(c.bytes for c in everything(prices))
    with pytest.raises(ValueError, match=f"no choice of bits fits: the fewest bits allowed take {least} bytes, 2.00 bits a weight"):
        allocate(prices, bytes=least - 1)
    assert allocate(prices, bytes=least).bytes == least
    with pytest.raises(ValueError, match="give a budget"):
        allocate(prices)
    with pytest.raises(ValueError, match="a has no price at 5 bits; it has prices for 2, 3, 4, 8"):
        allocate(prices, average=4, weights=(5,))
    with pytest.raises(ValueError, match="b has no price at 8 bits; it has prices for none at all, for it stays in float"):
        allocation(made(3, unpriced=("b",)), Bits())


def test_prices_and_bits_come_back_from_json():
    prices = made(4, unpriced=("c",))
    again = prices_from_dict(json.loads(json.dumps(prices_to_dict(prices))))
    assert again == prices
    found = allocate(prices, average=20, activations=ACTIVATIONS)
    assert allocation(again, bits_from_json(found.bits.to_json())) == found


@pytest.mark.parametrize(
    "spoil", [lambda d: [], lambda d: {**d, "version": 2}, lambda d: {**d, "weights": {"a": {"2": [1]}}}, lambda d: {**d, "layout": {}}]
)
def test_what_are_no_prices_is_refused(spoil):
    with pytest.raises(ValueError, match="prices of bits"):
        prices_from_dict(spoil(prices_to_dict(made(0))))


def test_the_solver_keeps_quiet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(solver, "milp", lambda costs: os.write(1, b"a remark of the solver") and costs)
    assert solver.solved("costs") == "costs"
    print("and then a word of ours")
    assert capfd.readouterr().out == "and then a word of ours\n"


def test_prices_that_are_not_numbers_are_refused() -> None:
    prices = made(0)
    spoilt = replace(prices, weights={**prices.weights, "b": {**prices.weights["b"], 4: Price(float("nan"), 0.0)}})
    with pytest.raises(ValueError, match="b has the price nan at 4 bits; prices must be finite: make them again"):
        allocate(spoilt, average=4.0)
