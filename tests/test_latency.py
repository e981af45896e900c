"""Latency from a table: interpolation over cliffs, the cost of a plan, search in blocks, refusal.  Nothing is timed here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import ceil
from pathlib import Path

import numpy as np
import pytest
from torch import nn
from zoo import make

from curvepress.costs import cost
from curvepress.latency import FLOAT, Axis, Grid, Layer, Machine, Table, check_machine, model_seconds, table_from_json, table_to_json
from curvepress.plan import Plan, tensors_after
from curvepress.planner.blocks import hull
from curvepress.planner.channels import at_most, search
from curvepress.runs.desk import Desk
from curvepress.runs.folder import create
from curvepress.runs.recipe import load_recipe
from curvepress.runs.settings import limits, timing
from curvepress.scores import Scores
from curvepress.stages.pipeline import run_stage
from curvepress.stages.searching import check_budget
from curvepress.stages.timetables import kept_promise
from curvepress.stopwatch import RUNTIMES, Case, Runtime, cached_table, calibrated, layers_of, measured_table, met, table_path
from curvepress.stopwatch.runtimes import kernel_seconds, machine
from curvepress.structure import Group, Member, Structure, TensorSpec
from curvepress.tracing.watching import trace

HERE = Machine("a processor", "onnxruntime", "1.0", 1, 1)
SMALL = Layer("conv", (8, 8), (3, 3), (1, 1), (1, 1), (1, 1))


def planted(case: Case) -> float:
    """Outputs in blocks of 16; inputs in blocks of 16 if they are a multiple of 4, else half as much again for each."""
    inside = ceil(case.into / 16) * 16 if case.into % 4 == 0 else 1.5 * case.into + 8
    return 1e-7 * ceil(case.out / 16) * inside


def timer(cases: Sequence[Case]) -> list[float]:
    return [planted(c) for c in cases]


def chain(*widths: int) -> Structure:
    """Convolutions in a row; the first reads 3 channels, and the last makes the output."""
    sizes = (3, *widths)
    tensors = {
        f"conv{n}.weight": TensorSpec((b, a, 3, 3), "float32", "parameter", 64) for n, (a, b) in enumerate(zip(sizes, widths, strict=False))
    }
    groups = tuple(
        Group(f"conv{n}", w, "channel", (_member(n, 0, w, "out"), _member(n + 1, 1, w, "in"))) for n, w in enumerate(widths[:-1])
    )
    return Structure(tensors, groups)


def _member(layer: int, dim: int, width: int, role: str) -> Member:
    return Member(f"conv{layer}.weight", dim, np.arange(width)[:, None], role)


def table_for(structure: Structure) -> Table:
    return measured_table(dict.fromkeys(structure.tensors, SMALL), structure.tensors, HERE, timer=timer)


def scored(structure: Structure, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    values = {g.name: rng.random(g.size) + 0.1 for g in structure.free}
    return Scores(values, {k: np.zeros_like(v) for k, v in values.items()}, "test", "rise of the loss", 1, seed)


def test_the_cliffs_are_found_and_no_width_is_interpolated_across_them() -> None:
    structure = chain(64, 64)
    grid = table_for(structure).grids[SMALL, 32]
    assert (grid.outs.period, grid.outs.align, grid.ins.align) == (16, 1, 4)
    pairs = list(product(range(17, 65), range(17, 65)))
    off = [abs(grid(o, i) / planted(Case(SMALL, o, i)) - 1) for o, i in pairs]
    assert max(off) < 1e-9
    assert grid(64, 63) > 1.4 * grid(64, 64)


def test_few_points_of_a_wide_layer_still_know_its_steps() -> None:
    structure = chain(512, 512)
    grid = table_for(structure).grids[SMALL, 32]
    assert len(grid.outs.knots) < 30
    off = [abs(grid(o, i) / planted(Case(SMALL, o, i)) - 1) for o in range(33, 513, 7) for i in range(36, 513, 12)]
    assert np.median(off) < 0.02
    assert max(off) < 0.35


def test_even_times_are_interpolated_along_a_line() -> None:
    table = measured_table({"conv0.weight": SMALL}, chain(40).tensors, HERE, timer=lambda cases: [c.out * c.into * 1e-6 for c in cases])
    grid = table.grids[SMALL, 32]
    assert grid(11, 2) == pytest.approx(22e-6)
    assert grid.outs.align == grid.outs.period == 1


def test_interpolation_written_out() -> None:
    axis = Axis((1, 4, 8, 15, 16), 16, 4)
    assert axis.between(8) == ((2, 1.0),)
    assert axis.between(12) == ((2, 0.5), (4, 0.5))
    assert axis.between(8 + 4 * 5) == ((4, 1.0),)
    assert axis.between(5) == ((0, pytest.approx(1 - 4 / 14)), (3, pytest.approx(4 / 14)))


def test_the_latency_of_a_plan_written_out() -> None:
    structure = chain(32, 64)
    table = replace(table_for(structure), fixed=1e-5, each=1e-9)
    plan = Plan(structure, {"conv0": tuple(range(16))})
    layers = planted(Case(SMALL, 16, 3)) + planted(Case(SMALL, 64, 16))
    assert cost(plan, table).latency == pytest.approx(layers + 1e-5 + 1e-9 * 64 * (16 + 64))
    assert cost(plan).latency is None


def test_bits_of_single_layers() -> None:
    structure = chain(32, 64)
    layers = dict.fromkeys(structure.tensors, SMALL)
    table = measured_table(layers, structure.tensors, HERE, bits=(32, 8), timer=lambda cs: [planted(c) * c.bits / 32 for c in cs])
    whole = model_seconds(structure.tensors, table)
    assert model_seconds(structure.tensors, table, dict.fromkeys(layers, 8)) == pytest.approx(whole / 4)
    assert table.layer("conv1.weight", 64, 32, 8) == pytest.approx(planted(Case(SMALL, 64, 32)) / 4)
    with pytest.raises(ValueError, match="at 8, 32 bits, not at 4"):
        table.layer("conv1.weight", 64, 32, 4)


def test_a_table_survives_its_json_and_bad_ones_are_refused() -> None:
    table = replace(table_for(chain(32, 16)), fixed=0.25)
    text = table_to_json(table)
    assert table_from_json(text) == table
    data = json.loads(text)
    data["grids"][0]["seconds"][0][0] = float("nan")
    with pytest.raises(ValueError, match="all above zero and finite"):
        table_from_json(json.dumps(data))
    data["grids"] = []
    for bad, why in ((json.dumps(data), "no times for conv0.weight"), ("{", "damaged"), ("[]", "no latency table")):
        with pytest.raises(ValueError, match=why):
            table_from_json(bad)
    with pytest.raises(ValueError, match="fixed = -1"):
        replace(table, fixed=-1)


@pytest.mark.parametrize(("part", "value"), [("processor", "another"), ("version", "2.0"), ("threads", 2), ("batch", 64)])
def test_a_table_from_elsewhere_is_refused(part: str, value: str | int) -> None:
    with pytest.raises(ValueError, match=f"stale.*{part} was .* and is {value!r}"):
        check_machine(table_for(chain(16, 16)), replace(HERE, **{part: value}))


def test_a_table_is_measured_once_and_a_stale_file_is_refused(tmp_path: Path) -> None:
    structure, path = chain(16, 16), tmp_path / "cache" / "table.json"
    made = cached_table(path, HERE, lambda: table_for(structure))
    assert cached_table(path, HERE, lambda: pytest.fail("measured twice")) == made
    with pytest.raises(ValueError, match="table.json: .*stale.*delete the file"):
        cached_table(path, replace(HERE, threads=2), lambda: made)
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


def test_tables_of_other_machines_are_kept_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CURVEPRESS_CACHE", str(tmp_path))
    structure = chain(16, 16)
    layers = dict.fromkeys(structure.tensors, SMALL)
    paths = {table_path(layers, structure.tensors, place) for place in (HERE, replace(HERE, threads=2), replace(HERE, version="2"))}
    assert len(paths) == 3
    assert all(p.is_relative_to(tmp_path) for p in paths)


@pytest.mark.parametrize("bits", [FLOAT, 8])
def test_what_a_model_takes_besides_its_layers_is_found(bits: int) -> None:
    structure = chain(64, 64, 64)
    layers = dict.fromkeys(structure.tensors, SMALL)
    table = measured_table(layers, structure.tensors, HERE, bits=sorted({FLOAT, bits}), timer=timer)
    truth, known = replace(table, fixed=3e-5, each=2e-10), dict.fromkeys(layers, bits)
    parts = [tensors_after(Plan(structure, {g.name: tuple(range(w)) for g in structure.free})) for w in (64, 32, 16)]
    found = calibrated(table, [(t, model_seconds(t, truth, known)) for t in parts], bits=known)
    assert (found.fixed, found.each) == (pytest.approx(3e-5), pytest.approx(2e-10))
    with pytest.raises(ValueError, match="above zero"):
        calibrated(table, [(parts[0], float("nan"))])


def test_the_layers_of_a_model_by_name() -> None:
    case = make("mobilenet")
    structure = trace(case.model, *case.example)
    layers = layers_of(case.model, *case.example)
    products = [n for n, t in structure.tensors.items() if t.positions and t.kind == "parameter" and len(t.shape) > 1]
    assert sorted(layers) == sorted(products)
    assert {layer.kind for layer in layers.values()} == {"conv", "linear"}
    assert {n for n, layer in layers.items() if layer.depthwise} == {"depthwise.0.weight"}


def test_a_profile_is_read_by_layer() -> None:
    def event(name: str, micros: float) -> dict:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": micros}

    events = [event(n, d) for d in (4, 5, 90, 6) for n in ("b0_y_nchwc", "fused b1_gemm", "b1_relu", "ReorderOutput", "quantize_b0_x")]
    assert kernel_seconds(events, 2) == [pytest.approx(4e-6)] * 2
    with pytest.raises(ValueError, match="no kernel of layer 2"):
        kernel_seconds(events, 3)


def test_search_by_latency_takes_blocks_and_spends_no_channel_for_nothing() -> None:
    structure = chain(64, 64, 64, 64)
    table, scores = table_for(structure), scored(structure)
    plan = search(structure, scores, at_most(latency=0.6), per="latency", table=table)
    now, whole = cost(plan, table).latency, cost(Plan(structure), table).latency
    assert now is not None and whole is not None
    assert 0.5 < now / whole <= 0.6
    for g in structure.free:
        kept = plan.keep.get(g.name, tuple(range(g.size)))
        assert len(kept) % 16 == 0
        assert set(kept) == set(np.argsort(-scores.values[g.name])[: len(kept)].tolist())


@pytest.mark.parametrize("share", [0.8, 0.6, 0.4, 0.25])
def test_search_by_latency_is_near_the_best_of_all_plans(share: float) -> None:
    structure = chain(64, 48, 32, 16)
    table, scores = table_for(structure), scored(structure, 3)
    whole = cost(Plan(structure), table).latency or 0.0
    losses = {g.name: np.concatenate([[0.0], np.cumsum(np.sort(scores.values[g.name])[::-1])]) for g in structure.free}

    def value(widths: tuple[int, ...]) -> tuple[float, float]:
        keep = {g.name: tuple(range(w)) for g, w in zip(structure.free, widths, strict=True)}
        left = sum(losses[g.name][w] for g, w in zip(structure.free, widths, strict=True))
        return cost(Plan(structure, keep), table).latency or 0.0, left

    every = [value(w) for w in product((16, 32, 48, 64), (16, 32, 48), (4, 8, 12, 16, 32))]
    plan = search(structure, scores, at_most(latency=share), per="latency", table=table)
    seconds, kept = value(tuple(len(plan.keep.get(g.name, range(g.size))) for g in structure.free))
    best = max((left for t, left in every if t <= share * whole), default=0.0)
    assert seconds <= share * whole
    assert kept >= 0.85 * best


def test_budgets_of_latency_are_shares_or_times() -> None:
    structure = chain(64, 64, 64)
    table = table_for(structure)
    whole = (cost(Plan(structure), table).latency or 0) * 1000
    scores = scored(structure)
    half = search(structure, scores, at_most(latency=0.5), per="latency", table=table)
    same = search(structure, scores, at_most(latency=f"{whole / 2:.9f}ms"), per="latency", table=table)
    assert half == same
    both = search(structure, scores, at_most(latency=0.7, params=0.3), per="latency", table=table)
    assert at_most(latency=0.7, params=0.3)(cost(both, table), cost(Plan(structure), table))
    assert str(at_most(latency="0.8ms")) == "latency at most 0.8 ms"


@pytest.mark.parametrize("limit", [0, -0.5, 1.5, "0ms", "-1ms", "nan", "fast", float("nan"), "infms"])
def test_wrong_latency_limits_are_refused(limit: float | str) -> None:
    with pytest.raises(ValueError, match="must be a share above 0 and up to 1, such as 0.6, or a time such as '0.8ms'"):
        at_most(latency=limit)


def test_a_latency_that_cannot_be_reached_names_the_nearest() -> None:
    structure = chain(64, 64, 64)
    table, scores = table_for(structure), scored(structure)
    with pytest.raises(ValueError, match=r"no plan fits the budget \(latency at most 0.01 .*smallest.*latency .* ms \("):
        search(structure, scores, at_most(latency=0.01), per="latency", table=table)
    with pytest.raises(ValueError, match="needs measured times"):
        search(structure, scores, at_most(latency=0.5))
    with pytest.raises(ValueError, match="needs measured times"):
        search(structure, scores, at_most(params=0.5), per="latency")
    with pytest.raises(ValueError, match="for another model: it has 'conv2.weight'"):
        cost(Plan(chain(64, 64)), table)


def test_scores_that_are_no_numbers_are_refused() -> None:
    structure = chain(64, 64, 64)
    scores = scored(structure)
    scores.values["conv1"][3] = np.nan
    with pytest.raises(ValueError, match="'conv1'.*no finite numbers"):
        search(structure, scores, at_most(latency=0.5), per="latency", table=table_for(structure))


def test_the_hull_steps_over_cliffs() -> None:
    widths = [5, 4, 3, 2, 1]
    seconds, loss = np.array([10.0, 15.0, 9.9, 5.0, 4.9]), np.array([99, 9.0, 3.0, 2.0, 1.0, 0.0])
    corners = hull(widths, seconds, loss)
    assert [w for _, w in corners] == [5, 2, 1]
    assert [p for p, _ in corners[1:]] == [pytest.approx(3 / 5), pytest.approx(60)]


@pytest.mark.parametrize("slower", [1.0, 1.2, 0.85])
@pytest.mark.parametrize("limit", [0.6, "ms"])
def test_the_loop_closes_on_the_measured_latency(slower: float, limit: float | str) -> None:
    structure = chain(*[64] * 8)
    table, scores = table_for(structure), scored(structure)
    whole = cost(Plan(structure), table).latency or 0.0
    limit = f"{600 * whole}ms" if limit == "ms" else limit

    def measure(plan: Plan) -> tuple[float, float]:
        return (cost(plan, table).latency or 0.0) * slower, whole

    found = met(limit, lambda aim: search(structure, scores, at_most(latency=aim), per="latency", table=table), measure, table)
    assert found.measured / found.asked == pytest.approx(1, abs=0.05)
    assert found.rounds == 1 if slower == 1 else 1 < found.rounds <= 3


def test_a_budget_that_is_never_kept_is_refused_with_the_nearest() -> None:
    structure = chain(64, 64, 64)
    table, plan = table_for(structure), Plan(structure, {"conv0": tuple(range(16))})
    with pytest.raises(ValueError, match=r"nearest of 3 took 0.900 of the original"):
        met(0.5, lambda aim: plan, lambda plan: (0.9, 1.0), table)


def test_runtimes_that_are_unknown_or_not_installed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="must be one of onnxruntime, openvino, torch, torch.compile; got 'tflite'"):
        machine("tflite")
    with pytest.raises(ValueError, match="one or more threads"):
        machine("torch", threads=0)

    def missing(name: str) -> str:
        from importlib.metadata import PackageNotFoundError

        raise PackageNotFoundError(name)

    monkeypatch.setattr("curvepress.stopwatch.runtimes.version", missing)
    with pytest.raises(ValueError, match="openvino is not installed: pip install openvino"):
        machine("openvino")


def test_a_grid_needs_all_its_times() -> None:
    with pytest.raises(ValueError, match="2 by 1 widths needs as many times"):
        Grid(Axis((1, 2)), Axis((1,)), ((1.0,),))


@pytest.fixture
def small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A run of the tiny recipe whose runtime takes its layers' planted times, one and a fifth of them once they are a model."""

    def list_of(ready: Sequence[float], *_: object) -> list[float]:
        return list(ready)

    def seconds(model: nn.Module) -> float:
        return 1.2 * sum(m.in_features * m.out_features * 1e-6 for m in model.modules() if isinstance(m, nn.Linear))

    runtime = Runtime(
        "onnxruntime",
        "onnxruntime",
        lambda cases, *_: [c.out * c.into * 1e-6 for c in cases],
        lambda m, *_: seconds(m),
        lambda ready, *_: ready,
    )
    monkeypatch.setitem(RUNTIMES, "onnxruntime", runtime)  # type: ignore[arg-type]
    monkeypatch.setenv("CURVEPRESS_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(str(Path(__file__).parent / "tiny_recipe.py"), {})
    (tmp_path / "run").mkdir()
    run = create(tmp_path / "run", recipe.name, recipe.options)
    run = run_stage(Desk(run, recipe), "trace", {"threads": 1}).run
    scoring = {"method": "magnitude", "samples": 2, "reliability": None, "seconds": None,
               "estimator": "auto", "precision": "full", "probes": 1,
               "temperature": 1.0, "seed": 0, "threads": 1}  # fmt: skip
    return Desk(run_stage(Desk(run, recipe), "score", scoring).run, recipe)


ASKED = {"params": None, "bytes": None, "macs": None, "latency": 0.6, "runtime": "onnxruntime", "threads": 1, "batch": 1, "per": "latency",
         "multiple": 1, "floor": 0.05, "whole": [], "aligned": False, "branches": 0}  # fmt: skip


def test_the_plan_stage_keeps_a_latency_budget_and_the_table(small_run: Desk, tmp_path: Path) -> None:
    said: list[str] = []
    desk = Desk(small_run.run, small_run.recipe, note=said.append)
    outcome = run_stage(desk, "plan", ASKED)
    plan = desk.plan()
    sizes = [len(plan.keep.get(g.name, range(g.size))) for g in plan.structure.free]
    macs = [6 * sizes[0] + sizes[0] * sizes[1] + sizes[1] * 3, 6 * 12 + 12 * 12 + 12 * 3]
    assert macs[0] / macs[1] == pytest.approx(0.6, abs=0.03)
    assert any("asked 0.6 of the original" in s and "measured 0." in s for s in said)
    assert len(list((tmp_path / "cache" / "latency").iterdir())) == 1
    again: list[str] = []
    run_stage(Desk(outcome.run, small_run.recipe, note=again.append), "plan", ASKED)
    assert not any("measuring" in s for s in again)
    assert kept_promise(Desk(outcome.run, small_run.recipe), desk.original(), desk.original())["measured"] == 1.0  # type: ignore[index]


def test_a_latency_out_of_reach_is_said_before_scoring(small_run: Desk) -> None:
    with pytest.raises(ValueError, match="no plan fits the budget .*latency .* ms"):
        check_budget(small_run, {**ASKED, "latency": 0.01})
    with pytest.raises(ValueError, match="already fits the budget"):
        check_budget(small_run, {**ASKED, "latency": "900ms"})


def test_latency_on_the_command_line() -> None:
    assert limits(None, None, None, latency="60%")["latency"] == limits("0.5", None, None, latency="0.6")["latency"] == 0.6
    assert limits(None, None, None, latency="0.8ms")["latency"] == "0.8ms"
    assert "latency" not in limits("0.5", None, None)
    for wrong in ("0", "-1ms", "150%", "2", "soon", "nan"):
        with pytest.raises(ValueError, match="--latency must be a share"):
            limits(None, None, None, latency=wrong)
    assert timing(None, "tflite", 1, 1) == {}
    with pytest.raises(ValueError, match="got 'tflite'"):
        timing("60%", "tflite", 1, 1)
