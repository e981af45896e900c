import json
import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from benchmarks import (
    curvature,
    curvature_cells,
    curvature_devices,
    curvature_hap,
    curvature_ours,
    curvature_peers,
    curvature_processes,
    curvature_required,
    curvature_tables,
    curvature_task,
)
from benchmarks import curvature_ranking as ranking
from benchmarks import curvature_reference as reference
from benchmarks.curvature_models import SMALL, SUBJECTS, Layer
from benchmarks.curvature_task import Task, sensitivity, sizes, weights
from curvepress_recipes.resnet import ResNet


@pytest.fixture
def small():
    """A network of ReLU and pooling and a batch, in float64."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU())
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3)).double().eval()
    model[1].running_var.uniform_(0.5, 2)
    return model, (torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.randint(3, (5,)))


def whole_hessian(model, batch):
    """The Hessian over all weights ``[p, p]``, in the order of ``weights``."""
    values = {n: w.detach() for n, w in weights(model).items()}
    shapes, lengths = [w.shape for w in values.values()], [w.numel() for w in values.values()]

    def loss(flat):
        parts = {n: p.view(s) for n, p, s in zip(values, flat.split(lengths), shapes, strict=True)}
        return F.cross_entropy(functional_call(model, parts, (batch[0],)), batch[1])

    return jacrev(jacrev(loss))(torch.cat([w.flatten() for w in values.values()]))


def channel_sums(model, values):
    """Sums over channels of a vector over all weights."""
    return np.array([part.sum().item() for part in values.split([int(s) for s in sizes(model)])])


def test_root_of_the_output_hessian():
    p = torch.randn(7, 5, dtype=torch.float64).softmax(1)
    s = reference.root(p.log())
    torch.testing.assert_close(s @ s.mT, torch.diag_embed(p) - p[:, :, None] * p[:, None, :])


def test_exact_reference_is_the_trace_of_the_dense_hessian(small):
    model, batch = small
    dense = channel_sums(model, whole_hessian(model, batch).diagonal())
    np.testing.assert_allclose(reference.exact(model, batch), dense, rtol=1e-10, atol=1e-14)


def test_squares_with_all_directions_are_the_exact_reference(small):
    model, batch = small
    root = reference.root(model(batch[0]).detach())
    directions = root.mT.flatten(0, 1)  # rows are columns of the roots
    total = reference.squares(model, batch[0].repeat_interleave(3, 0), directions, chunk=4)
    np.testing.assert_allclose(total / len(batch[0]), reference.exact(model, batch), rtol=1e-10, atol=1e-14)


def test_squares_of_nothing_are_zero(small):
    model, batch = small
    assert not reference.squares(model, batch[0][:0], batch[0].new_zeros(0, 3)).any()


@pytest.mark.parametrize("sums", [curvature_hap.one_by_one, curvature_hap.at_once])
def test_hap_probes_are_vhv_by_channel(small, sums):
    model, batch = small
    dense = whole_hessian(model, batch)
    found = list(curvature_hap.hap(model, batch, 3, seed=5, sums=sums))
    torch.manual_seed(5)
    for probe in found:
        v = torch.cat([(torch.randint_like(w, high=2) * 2 - 1).flatten() for w in weights(model).values()])
        np.testing.assert_allclose(probe, channel_sums(model, v * (dense @ v)), rtol=1e-10, atol=1e-14)


def test_hap_differentiates_convolutions_and_linear_layers_only(small):
    model, batch = small
    list(curvature_hap.hap(model, batch, 1, seed=0))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(weights(model))


def test_ehap_never_takes_its_loss_scale_out():
    torch.manual_seed(0)
    model = ResNet(8).eval()
    batch = (torch.randn(4, 3, 16, 16), torch.randint(10, (4,)))
    single = list(curvature_hap.hap(model, batch, 3, seed=1))
    half = list(curvature_hap.ehap(model, batch, 3, seed=1))
    assert [p.scale for p in half] == [256, 1, 1 / 256]
    for a, b in zip(half[:2], single, strict=False):
        assert abs(a.channels.sum() / (a.scale * b.sum()) - 1) < 0.05
    share = [np.abs(p.channels).sum() for p in half]
    assert share[0] / sum(share) > 0.98


def test_sensitivity_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model.load_state_dict({"0.weight": torch.tensor([[1.0, 2.0], [0.0, 3.0]]), "1.weight": torch.tensor([[2.0, 2.0]])})
    np.testing.assert_allclose(sensitivity(model, np.array([2.0, 1.0, 3.0])), [5, 4.5, 12])
    np.testing.assert_allclose(sensitivity(model, sizes(model)), [5, 9, 8])  # squared norms


def test_rank_correlation_is_that_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, (2, 40))  # with ties
    assert math.isclose(ranking.spearman(a, b), spearmanr(a, b).statistic, rel_tol=1e-12)


def test_overlap_by_hand():
    assert ranking.overlap(np.array([1, 2, 3, 4.0]), np.array([1, 3, 2, 4.0])) == 0.5
    assert ranking.overlap(np.array([1, 2, 3, 4.0]), np.array([2, 1, 8, 9.0])) == 1


def test_bootstrap_is_centred_and_shrinks_as_it_should():
    rng = np.random.default_rng(0)
    probes, exact = rng.normal(3, 2, (200, 4)), np.arange(4.0)
    means = ranking.resampled(probes, exact, 50, 4000, np.random.default_rng(1))
    np.testing.assert_allclose(means.mean(0), exact, atol=5 * 2 / np.sqrt(50 * 4000))
    np.testing.assert_allclose(means.var(0), probes.var(0) / 50, rtol=0.15)


def test_probes_needed_agree_with_fresh_ones():
    rng = np.random.default_rng(0)
    exact = rng.lognormal(0, 1, 300)
    recorded = exact + 20 * exact * rng.standard_normal((250, 300))
    count = ranking.needed(recorded, exact, 0.9)
    fresh = [ranking.spearman(exact + 20 * exact * rng.standard_normal(300) / np.sqrt(count), exact) for _ in range(50)]
    assert abs(np.median(fresh) - 0.9) < 0.02
    assert ranking.needed(recorded, exact, 0.8) < count < ranking.needed(recorded, exact, 0.95)


def test_probes_needed_has_an_end():
    probes = np.random.default_rng(0).normal(0, 1e6, (5, 10))
    with pytest.raises(ValueError, match="not even 20 probes reach a rank correlation of 0.99"):
        ranking.needed(probes, np.arange(10.0), 0.99, most=20)


def test_grid_of_counts_grows_without_gaps():
    grid = list(ranking._grid(200))
    assert grid[:12] == list(range(1, 13))
    assert all(a < b <= max(a + 1, 1.08 * a) for a, b in pairwise(grid))


@pytest.fixture
def task_of_noise(monkeypatch):
    """Twelve images of noise: eight are the population, in shards of four."""
    monkeypatch.setattr(reference, "SHARD", 4)
    monkeypatch.setattr(reference, "POPULATION", 8)
    monkeypatch.setattr("benchmarks.curvature_task.POPULATION", 8)
    torch.manual_seed(0)
    return Task(ResNet(8).eval(), torch.randint(256, (12, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (12,)))


def test_population_and_pool_do_not_meet(task_of_noise):
    inside, pool = task_of_noise.population(0, 100)[0], task_of_noise.pool(4)[0]
    assert len(inside) == 8
    assert not any(torch.equal(a, b) for a in inside for b in pool)


def test_population_reference_resumes_to_the_same(task_of_noise, tmp_path, monkeypatch):
    shards = reference.population(task_of_noise, tmp_path, 8)
    exact, found = reference.exact(task_of_noise.model, task_of_noise.population(0, 8)), shards.mean(0)
    assert (found <= 1.0001 * exact).all()  # what is left out was positive
    assert 0.995 < found.sum() / exact.sum() < 1
    (tmp_path / "population-8" / "000004.npy").unlink()
    computed = []
    kept = reference.squares
    monkeypatch.setattr(reference, "squares", lambda *a: computed.append(1) or kept(*a))
    np.testing.assert_array_equal(reference.population(task_of_noise, tmp_path, 8), shards)
    assert len(computed) == 1


def test_most_of_the_mass_is_kept():
    values = np.random.default_rng(0).exponential(1, 5000) ** 3
    least = reference._least(values)
    kept = values[values >= least]
    assert kept.sum() >= reference.MASS * values.sum() > kept.sum() - least


def test_exact_reference_of_the_batch_is_kept_and_leaves_the_model_as_it_was(task_of_noise, tmp_path):
    first = reference.exact_of_batch(task_of_noise, 2, tmp_path)
    assert next(task_of_noise.model.parameters()).dtype == torch.float32
    np.testing.assert_array_equal(reference.exact_of_batch(task_of_noise, 2, tmp_path), first)


def test_recorded_probes_resume(task_of_noise, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2)
    first = list(reference.probes(task_of_noise, tmp_path, 2, 4))
    monkeypatch.setattr(reference, "hap", None)
    again = list(reference.probes(task_of_noise, tmp_path, 2, 4))
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))
    assert len(np.unique(np.concatenate(first)[:, 0])) == 4


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning", "ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize(("module", "peer"), [("curvlinops", "curvlinops_exact"), ("backpack", "backpack_exact")])
def test_exact_peers_agree_with_the_reference(module, peer, task_of_noise):
    pytest.importorskip(module, reason=f"{module} is not installed; see benchmarks/README.md")
    (found,) = getattr(curvature_peers, peer)(task_of_noise.model, task_of_noise.pool(3))
    np.testing.assert_allclose(found, reference.exact(task_of_noise.model, task_of_noise.pool(3)), rtol=1e-3)


@pytest.mark.parametrize(("module", "peer"), [("curvlinops", "curvlinops_probes"), ("pyhessian", "pyhessian")])
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning", "ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_probing_peers_multiply_by_the_same_hessian(module, peer, task_of_noise):
    pytest.importorskip(module, reason=f"{module} is not installed; see benchmarks/README.md")
    mine = list(curvature_hap.hap(task_of_noise.model, task_of_noise.pool(3), 2, seed=3))
    theirs = list(getattr(curvature_peers, peer)(task_of_noise.model, task_of_noise.pool(3), 2, seed=3))
    np.testing.assert_allclose([t.sum() for t in theirs], [m.sum() for m in mine], rtol=1e-3)


def test_cell_measures_and_compares(task_of_noise, tmp_path, monkeypatch):
    monkeypatch.setattr(curvature_cells, "task", lambda depth, cache: task_of_noise)
    monkeypatch.setattr(curvature_cells, "BATCH", 2)
    reference.exact_of_batch(task_of_noise, 2, tmp_path / "resnet8")
    record = curvature_cells.cell(8, "hap", 0, tmp_path)
    assert len(record["steps"]) == curvature_cells.PROBES
    assert min(record["steps"]) > 0
    assert -1 <= record["same"] <= 1
    assert "population" not in record  # there is no such reference yet
    json.dumps(record)


@pytest.mark.parametrize("subject", SMALL)
@pytest.mark.parametrize("way", curvature_devices.WAYS)
def test_device_cells_run_small(subject, way):
    record = curvature_devices.cell(subject, way, curvature_devices.WAYS[way][1][0], device="cpu", small=True)
    assert len(record["seconds"]) >= 1
    assert record["memory"] >= 0
    json.dumps(record)


def test_full_and_small_subjects_have_the_same_names():
    assert list(SMALL) == list(SUBJECTS)


def test_sizes_of_the_published_networks():
    with torch.device("meta"):
        counts = {n: sum(p.numel() for p in SUBJECTS[n].model().parameters()) for n in ("wrn28-8", "vit-s", "bert-base")}
    assert counts["wrn28-8"] == pytest.approx(23.4e6, rel=0.01)
    assert counts["vit-s"] == pytest.approx(22.05e6, rel=0.01)
    assert counts["bert-base"] == pytest.approx(109.5e6, rel=0.01)


EXTRAPOLATED = {
    "depth": 20,
    "mode": "hap_extrapolated",
    "batch": 0,
    "probes": 250,
    "relative_deviation": 9.0,
    "population_halves": 0.99,
    "of_300": {"same": [0.8], "population": [0.7]},
    "exact_of_batch": {"population": 0.9},
    "without_curvature": {"mean_square": 0.8, "squared_norm": 0.6},
}


def test_tables_of_records(capsys):
    cell = {"depth": 20, "steps": [1.0, 0.5, 0.5], "peak": 800.0, "same": 0.5}
    exact = {"depth": 20, "steps": [2.5, 2.0], "peak": 200.0, "same": 1.0, "population": 0.9}
    found = {"depth": 20, "mode": "equality", "differences": {"conv1.weight[0]": 1e-15}}
    measured = [{**cell, "mode": "hap", "round": r} for r in (0, 1)] + [{**exact, "mode": "backpack_exact", "round": 0}]
    curvature_tables.show([*measured, found, {**EXTRAPOLATED, "needed": {"0.95": 1000}}])
    printed = capsys.readouterr().out
    assert "| hap | 2 | 0.5 (0.5–0.5) | 1 | 1.00 | – | 800 (800–800) | +0 % | 0.5000 (0.5000–0.5000) | – |" in printed
    assert "| backpack_exact | 1 | 2 | 2.5 | 4.00 | 250× | 200 | -75 % | 1.0000 | 0.9000 |" in printed


def test_required_figures_are_ratios_within_a_round_of_the_newest_code(capsys):
    def cell(mode, turn, code, seconds, **more):
        return {
            "depth": 20,
            "mode": mode,
            "round": turn,
            "code": code,
            "steps": [9.0, seconds],
            "peak": 100.0 * seconds,
            "same": 1.0,
            **more,
        }

    old = [cell("exact", r, "old", 50.0) for r in (0, 1, 2)]
    new = [cell(m, r, "new", s * (r + 1)) for m, s in (("exact", 2.0), ("hap", 10.0), ("curvlinops_exact", 6.0)) for r in (0, 1)]
    wide = [cell("hessian", 0, "new", 12.0, probes=12), cell("pyhessian", 0, "new", 2.0)]
    many = [cell("population_1024", 0, "new", 3.0, population=0.98)]
    two = {"depth": 20, "mode": "processes", "turn": 0, "one": {"wall": 3.0}, "two": {"wall": 2.0}, "difference": 0.0}
    curvature_required.required([*old, *new, *wide, *many, two, {**EXTRAPOLATED, "needed": {"0.95": 1000}}])
    printed = capsys.readouterr().out.splitlines()
    for line in (
        "CPU time to ρ 0.95 on the same images, HAP against `exact` | ≥ 1,000× | 5,000× (5,000 to 5,000), at ρ ≥ 1.000",
        "exact trace, in HAP's probes | ≤ 5 | 0.20 (0.20 to 0.20)",
        "exact trace, curvlinops' exact diagonal against ours | ≥ 2.5× | 3.00 (3.00 to 3.00)",
        "a Hessian product, ours against PyHessian's | ≤ 1 | 0.50",
        "peak memory above idle, `exact` against HAP | ≤ -70 % | -80 % (-80 to -80)",
        "`population_1024`: ranking of the population; CPU s | ρ ≥ 0.97; ≤ 4 | 0.980; 3.00",
        "two processes against one: wall clock; difference | ≥ 1.7×; 0 | 1.50×; 0e+00",
    ):
        assert f"| ResNet-20: {line} |" in printed


def test_the_tables_show_the_newest_code_of_each_way():
    rows = [{"depth": d, "mode": m, "round": 0, "code": c} for d, m, c in ((20, "a", 1), (20, "b", 1), (56, "a", 1), (20, "a", 2))]
    rest = {"depth": 20, "mode": "equality"}
    assert curvature_required.newest([*rows, rest]) == [*rows[1:], rest]
    assert re.fullmatch("[0-9a-f]{8}", curvature.code())


def test_extrapolation_has_a_table(task_of_noise, capsys):
    rng = np.random.default_rng(0)
    exact = rng.lognormal(0, 1, 250)
    probes = exact + exact * rng.standard_normal((30, 250))
    found = curvature._extrapolated(task_of_noise.model, probes, exact, np.stack([exact, 1.1 * exact]))
    assert found["needed"]["0.9"] <= found["needed"]["0.95"] <= found["needed"]["0.99"]
    assert found["exact_of_batch"]["population"] == pytest.approx(1)
    curvature_tables.show([{"depth": 20, "mode": "hap_extrapolated", "batch": 0, **found}])
    assert "centred bootstrap of 30 real probes a batch" in capsys.readouterr().out


def test_layers_norm_before_or_after_their_sums():
    torch.manual_seed(0)
    x = 5 + torch.randn(2, 3, 8)
    after, before = (Layer(8, 2, first=first)(x) for first in (False, True))
    torch.testing.assert_close(after.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    assert (before.mean(-1) > 3).all()  # the sum carries the input on


def test_our_rows_agree_with_the_reference(task_of_noise):
    model, pool = task_of_noise.model, task_of_noise.pool(3)
    cold, warm = curvature_ours.twice(pool, model, estimator="exact")
    np.testing.assert_allclose(warm, reference.exact(model, pool), rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(cold, warm)


def test_our_probes_are_of_the_same_hessian(task_of_noise):
    task_of_noise.model.double()
    inputs, targets = task_of_noise.pool(3)
    one, more = curvature_ours.probed((inputs.double(), targets), task_of_noise.model, seed=0)
    exact = reference.exact(task_of_noise.model, (inputs.double(), targets))
    assert len(one) == len(more) == len(exact)
    assert abs(more.sum() - exact.sum()) < abs(exact.sum())


def test_exact_estimate_equals_unit_vectors():
    torch.manual_seed(0)
    work = Task(ResNet(8).eval(), torch.randint(256, (curvature_task.POPULATION + 2, 1, 1, 3), dtype=torch.uint8), torch.zeros(1).long())
    work = replace(work, labels=torch.randint(10, (len(work.pixels),)))
    differences = curvature_ours.equality(work, images=1)
    assert len(differences) == 2
    assert max(differences.values()) < 1e-10


def test_population_estimates_have_images_of_their_own(task_of_noise, monkeypatch):
    asked = []
    monkeypatch.setattr(curvature_ours, "traces", lambda model, batches, **_: asked.append([len(b[1]) for b in batches]))
    monkeypatch.setattr(Task, "pool", lambda self, size, start=0: (None, range(size)))
    list(curvature_ours.population(images=512, again=2)(task_of_noise, 0))
    assert asked == [[curvature_ours.SHARD] * (curvature_ours.APART // curvature_ours.SHARD)] * 2


def test_two_processes_report_what_one_does(monkeypatch, tmp_path):
    runs = {1: ({"cpu": 2.0, "wall": 2.0}, np.array([1.0, 2.0])), 2: ({"cpu": 1.1, "wall": 1.2}, np.array([1.0, 2.002]))}
    monkeypatch.setattr(curvature_processes, "_run", lambda depth, cache, images, count: runs[count])
    found = curvature_processes.compared(20, tmp_path)
    assert found["difference"] == pytest.approx(1e-3)
    assert found["two"]["cpu"] == 1.1
