"""Sampled estimators: unbiased, with error bars that cover, the same whatever the pieces, resumed, stopped and reported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from curvature_zoo import CASES, Flat, Flow, N, images, made, words
from torch import Tensor, nn
from torch.nn import functional as F

from curvepress import curvature
from curvepress.curvature import Stop, average
from curvepress.objective import Batch

SMOOTH = CASES["gelu"]
DRAWN = ("pairs", "sketch", "monte_carlo_fisher", "gauss_newton", "hessian", "controlled", "gap")
FIRST = ("exact", "pairs", "sketch", "monte_carlo_fisher", "empirical_fisher")


def smooth() -> nn.Module:
    """Confident about some examples, so that their weights in a draw differ."""
    model = made(SMOOTH)
    model[2].weight.data *= 4
    return model


def every(model: nn.Module) -> dict[str, curvature.Measure]:
    """Measures of every kind on the first layers of ``smooth``."""
    weight = curvature.along("0.weight", (5, 4), 0)
    joint = curvature.Direction((weight, curvature.along("0.bias", (5,), 0)), 5)
    rest = {n: curvature.layer(n) for n, _ in model.named_parameters()}
    return (
        rest
        | {"rows": curvature.output_channels("0.weight", model[0].weight), "joint": joint, "own": curvature.Direction((weight,), 5)}
        | {"a": curvature.Activation("1"), "units": curvature.Activation("1", 1)}
    )


def truth(model: nn.Module, batch: Batch) -> dict[str, dict[str, np.ndarray]]:
    """What ``every`` asks, from the dense Hessian and Gauss-Newton matrix."""
    flat = Flat(model, batch)
    inner = Flat(nn.Sequential(*list(model)[2:]), (model[:2](batch[0]).detach(), batch[1]))
    found = {}
    for quantity in ("hessian", "gauss_newton"):
        dense = getattr(flat, quantity)()
        diagonal = flat.split(np.diag(dense))
        rows = np.repeat(np.arange(5), 4)
        moves = np.stack([np.concatenate([(rows == c), np.arange(5) == c, np.zeros(len(flat.point) - 25)]) for c in range(5)])
        d = moves * flat.point.numpy()
        w = d * (np.arange(d.shape[1]) < 20)
        activation = activations(inner, quantity)
        found[quantity] = {n: np.array([v.sum()]) for n, v in diagonal.items()} | {
            "rows": diagonal["0.weight"].reshape(5, 4).sum(1),
            "joint": np.einsum("ci,ij,cj->c", d, dense, d),
            "own": np.einsum("ci,ij,cj->c", w, dense, w),
            "units": activation,
            "a": activation.sum(keepdims=True),
        }
    found["gap"] = {n: found["hessian"][n] - found["gauss_newton"][n] for n in found["hessian"]}
    return found


def activations(inner: Flat, quantity: str) -> np.ndarray:
    """Traces by unit with respect to the inputs of the network ``inner``."""
    x, y = inner.batch
    model = Flow(lambda m, _: inner.model(m.x), x=x.clone())
    return np.diag(getattr(Flat(model, (x, y)), quantity)()).reshape(x.shape).sum(0)


QUANTITY = {"hessian": "hessian", "controlled": "hessian", "gap": "gap"}


@pytest.mark.parametrize("estimator", DRAWN)
def test_the_mean_over_many_draws_is_the_truth(estimator: str) -> None:
    model, batch = smooth(), images(4, count=6)
    want = truth(model, batch)[QUANTITY.get(estimator, "gauss_newton")]
    draws = 60
    found = curvature.estimate(model, F.cross_entropy, [batch] * draws, every(model), estimator=estimator, rate=0.5, seed=1)
    for name, values in want.items():
        # of 20 values a right one is further away than 4.5 standard errors (Student's t) once in 1,500 such tests
        assert (np.abs(found.mean[name] - values) <= 4.5 * found.stderr[name] + 1e-9).all(), name
        assert (found.stderr[name] <= 0.5 * (np.abs(values).max() + np.abs(want["rows"]).max())).all(), name


@pytest.mark.parametrize(("estimator", "noise"), [("pairs", False), ("sketch", False), ("hessian", False), ("exact", True)])
def test_two_standard_errors_cover_the_truth_as_often_as_they_say(estimator: str, noise: bool) -> None:
    # With 12 samples the share within two standard errors should be 93 % (Student's t); of 150 dependent outcomes, 85 to 99 %.
    model = smooth()
    batches = [images(4, count=4, seed=s) for s in range(12 * 25)] if noise else [images(4, count=6)] * (12 * 25)
    asked = {"rows": curvature.output_channels("0.weight", model[0].weight), "b": curvature.layer("0.bias")}
    done: dict[int, curvature.Sample] = {}
    whole = curvature.estimate(model, F.cross_entropy, batches, asked, estimator=estimator, rate=0.5, done=done)
    table = np.stack([np.concatenate([done[n]["rows"], done[n]["b"]]) for n in range(len(batches))])
    exact = truth(model, batches[0])[QUANTITY.get(estimator, "gauss_newton")]
    want = table.mean(0) if noise else np.concatenate([exact["rows"], exact["0.bias"]])
    parts = [average(t, np.ones(12)) for t in np.split(table, 25)]
    inside = np.stack([np.abs(p.mean - want) <= 2 * p.stderr for p in parts]).mean()
    assert 0.85 <= inside <= 0.99
    np.testing.assert_allclose(whole.stderr["rows"], (table.std(0, ddof=1) / np.sqrt(len(table)))[:5])


def test_a_control_variate_is_less_noisy_than_plain_probing() -> None:
    model, batch = smooth(), images(4, count=8)
    spread = {
        e: curvature.estimate(
            model, F.cross_entropy, [batch] * 60, {"w": curvature.output_channels("0.weight", model[0].weight)}, estimator=e
        )
        for e in ("hessian", "controlled")
    }
    assert (spread["controlled"].stderr["w"] < spread["hessian"].stderr["w"]).mean() > 0.5


def test_pairs_that_are_all_taken_are_exact_and_fewer_are_drawn_at_a_lower_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    from curvepress.curvature import gauss_newton

    model, batch = smooth(), images(4, count=32)
    asked = {"w": curvature.elements("0.weight", model[0].weight)}
    exact = curvature.estimate(model, F.cross_entropy, [batch], asked, estimator="exact")
    full = curvature.estimate(model, F.cross_entropy, [batch], asked, estimator="pairs", rate=1e9)
    np.testing.assert_allclose(full.mean["w"], exact.mean["w"], rtol=1e-12)
    counts: list[int] = []
    original = gauss_newton.summed
    monkeypatch.setattr(gauss_newton, "summed", lambda *a: counts.append(len(a[3][0])) or original(*a))
    for rate in (0.35, 0.7):
        curvature.estimate(model, F.cross_entropy, [batch] * 4, asked, estimator="pairs", rate=rate)
    assert max(counts[:4]) <= 32 * 0.35 + 1 and max(counts[4:]) <= 32 * 0.7 + 1 and sum(counts[:4]) < sum(counts[4:])


def test_the_smallest_batch_still_draws_pairs() -> None:
    model, batch = smooth(), images(4, count=3)
    asked = {"w": curvature.elements("0.weight", model[0].weight)}
    found = curvature.estimate(model, F.cross_entropy, [batch], asked, estimator="pairs", rate=1e-3)
    assert (found.mean["w"] > 0).any()


def test_what_is_omitted_is_at_most_the_share_allowed() -> None:
    model, batch = smooth(), images(4, count=8)
    asked = {"b": curvature.layer("2.bias")}  # the outputs have slope one in it, so its trace is the mass itself
    want = curvature.estimate(model, F.cross_entropy, [batch], asked, estimator="exact").mean["b"]
    for omit in (0.05, 0.3):
        found = curvature.estimate(model, F.cross_entropy, [batch], asked, estimator="exact", omit=omit).mean["b"]
        assert want * (1 - omit) - 1e-12 <= found < want


def gradients(model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
    """Mean over examples of the squared gradients of their own losses, one example at a time."""
    total = {n: np.zeros(p.shape) for n, p in model.named_parameters()}
    for n in range(len(batch[1])):
        loss = F.cross_entropy(model(batch[0][n : n + 1]), batch[1][n : n + 1])
        for name, g in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total[name] += g.square().numpy() / len(batch[1])
    return total


def test_the_empirical_fisher_is_its_definition_and_says_that_it_is_biased() -> None:
    model, batch = smooth(), images(4)
    asked = {n: curvature.elements(n, p) for n, p in model.named_parameters()}
    found = curvature.estimate(model, F.cross_entropy, [batch], asked, estimator="empirical_fisher", micro=2)
    for name, values in gradients(model, batch).items():
        np.testing.assert_allclose(found.mean[name], values.flatten(), rtol=1e-10)
    assert found.quantity == "empirical Fisher" and found.bias.startswith("biased")
    assert "equal" not in str(found) and "differs" not in str(found)


@pytest.mark.parametrize("estimator", curvature.ESTIMATORS)
def test_pieces_change_nothing(estimator: str) -> None:
    torch.manual_seed(0)
    model = Flow(
        lambda m, x: m.out(F.gelu(m.inner(m.table(x)))), table=nn.Embedding(6, 3), inner=nn.Linear(3, 4), out=nn.Linear(4, 3)
    ).double()
    x = words(4, count=7)[0]
    y = torch.where(torch.arange(4) < torch.tensor([4, 1, 0, 2, 4, 3, 1])[:, None], x % 3, -100)

    def loss(z: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1), target.flatten())

    asked: dict[str, curvature.Measure] = {n: curvature.elements(n, p) for n, p in model.named_parameters()}
    asked |= {"d": curvature.Direction((curvature.along("inner.weight", (4, 3), 0),), 4)}
    if estimator in FIRST:
        asked |= {"a": curvature.Activation("inner", -1)}
    whole = curvature.estimate(model, loss, [(x, y)], asked, estimator=estimator, micro=7, rate=0.5)
    for micro in (1, 2, 3, 100):
        found = curvature.estimate(model, loss, [(x, y)], asked, estimator=estimator, micro=micro, rate=0.5)
        for name, values in whole.mean.items():
            np.testing.assert_allclose(found.mean[name], values, rtol=1e-9, atol=1e-13, err_msg=f"{name} {micro}")


@pytest.mark.parametrize("estimator", curvature.ESTIMATORS)
def test_work_goes_on_where_it_stopped(estimator: str) -> None:
    model, batches = smooth(), [images(4, seed=s) for s in range(6)]
    asked = every(model)
    whole = curvature.estimate(model, F.cross_entropy, batches, asked, estimator=estimator, seed=3)
    done: dict[int, curvature.Sample] = {}
    part = curvature.estimate(model, F.cross_entropy, batches, asked, estimator=estimator, seed=3, done=done, stop=Stop(samples=2))
    assert part.samples == 2 and part.examples == 2 * N and list(done) == [0, 1]
    first = done[0]  # not to be made again
    kept = {n: {m: v.copy() for m, v in s.items()} for n, s in done.items()}
    resumed = curvature.estimate(model, F.cross_entropy, batches, asked, estimator=estimator, seed=3, done=done)
    assert list(done) == list(range(6))
    assert done[0] is first
    for name in asked:
        np.testing.assert_array_equal(resumed.mean[name], whole.mean[name])
        np.testing.assert_array_equal(resumed.stderr[name], whole.stderr[name])
        np.testing.assert_array_equal(np.stack([s[name] for s in kept.values()]).mean(0), part.mean[name])


def test_an_interruption_leaves_samples_that_can_be_used() -> None:
    model, batches = smooth(), [images(4, seed=s) for s in range(5)]
    asked = {"w": curvature.output_channels("0.weight", model[0].weight)}
    done: dict[int, curvature.Sample] = {}

    def broken() -> Iterator[Batch]:
        yield from batches[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curvature.estimate(model, F.cross_entropy, broken(), asked, estimator="pairs", done=done)
    assert list(done) == [0, 1, 2]
    whole = curvature.estimate(model, F.cross_entropy, batches, asked, estimator="pairs")
    resumed = curvature.estimate(model, F.cross_entropy, batches, asked, estimator="pairs", done=done)
    np.testing.assert_array_equal(resumed.mean["w"], whole.mean["w"])


def test_seeds_decide_and_the_global_generator_is_left_alone() -> None:
    model, batches = smooth(), [images(4, seed=s) for s in range(3)]
    asked = {"w": curvature.elements("0.weight", model[0].weight)}

    def run(seed: int, ahead: int) -> np.ndarray:
        torch.manual_seed(ahead)
        before = torch.get_rng_state()
        found = curvature.estimate(model, F.cross_entropy, batches, asked, estimator="sketch", seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return found.mean["w"]

    np.testing.assert_array_equal(run(0, 1), run(0, 2))
    assert not np.array_equal(run(0, 1), run(1, 1))


STOPS: dict[str, tuple[Stop, int, str]] = {
    "none": (Stop(), 20, "all batches are used"),
    "samples": (Stop(samples=3), 3, "3 batches were allowed"),
    "examples": (Stop(examples=12), 3, "12 examples were allowed"),
    "seconds": (Stop(seconds=0.0, every=2), 2, "0 seconds were allowed"),
    "reliability": (Stop(reliability=0.5), 4, r"reliability 0\.\d+ reached 0.5"),
    "never": (Stop(reliability=1.1), 20, "all batches are used"),
    "stability": (Stop(stability=0.6, share=0.4), 8, r"stability [01]\.\d+ of the lowest 40% reached 0.6"),
    "first": (Stop(samples=8, reliability=0.5), 4, "reliability"),
}


@pytest.mark.parametrize("name", STOPS)
def test_the_first_condition_that_holds_ends_the_work_and_is_recorded(name: str) -> None:
    stop, samples, reason = STOPS[name]
    model, seen = smooth(), []

    def batches() -> Iterator[Batch]:
        for s in range(20):
            seen.append(s)
            yield images(4, seed=s)

    asked = {"w": curvature.elements("0.weight", model[0].weight)}
    found = curvature.estimate(model, F.cross_entropy, batches(), asked, estimator="exact", stop=stop)
    assert found.samples == samples == len(seen) and found.examples == N * samples
    assert re.match(reason, found.stopped)
    assert found.reliability is not None and f"stopped: {found.stopped}" in str(found)


def test_stopping_rules_rank_what_is_to_be_decided() -> None:
    model, batches = smooth(), [images(4, seed=s) for s in range(12)]
    asked = {"w": curvature.elements("0.weight", model[0].weight)}

    def hard(sample: curvature.Sample) -> curvature.Sample:
        return {"noise": sample["w"] * 1e-9 + np.random.default_rng(int(sample["w"][0] * 1e15)).random(20)}

    easy = curvature.estimate(model, F.cross_entropy, batches, asked, estimator="exact", stop=Stop(reliability=0.8))
    found = curvature.estimate(model, F.cross_entropy, batches, asked, estimator="exact", stop=Stop(reliability=0.8), decide=hard)
    assert easy.samples == 8 and found.samples == 12 and list(found.mean) == ["noise"]


def test_progress_forecasts_what_is_left_under_the_caps() -> None:
    model, batches = smooth(), [images(4, seed=s) for s in range(8)]
    asked = {"w": curvature.layer("0.weight")}

    def followed(stop: Stop) -> list[curvature.Progress]:
        seen: list[curvature.Progress] = []
        curvature.estimate(model, F.cross_entropy, batches, asked, estimator="exact", stop=stop, progress=seen.append)
        return seen

    for p in (seen := followed(Stop(samples=8))):
        assert p.wanted == 8 and p.expected == pytest.approx(p.seconds * (8 - p.samples) / p.samples) and p.peak >= 0
    assert [p.samples for p in seen] == list(range(1, 9)) and [p.examples for p in seen] == [N * n for n in range(1, 9)]
    assert [p.reliability is None for p in seen] == [True] * 4 + [False] * 4
    assert all(p.expected == pytest.approx(max(0, p.seconds * (20 / p.examples - 1))) for p in followed(Stop(examples=20)))
    assert all(p.expected == pytest.approx(1e6 - p.seconds) for p in followed(Stop(seconds=1e6)))
    assert all(p.expected is None and p.wanted is None for p in followed(Stop()))
    assert all(p.expected <= p.seconds * (8 - p.samples) / p.samples + 1e-6 for p in followed(Stop(samples=8, seconds=1e6)))


def test_samples_of_one_batch_say_nothing_about_their_error() -> None:
    model = smooth()
    found = curvature.estimate(model, F.cross_entropy, [images(4)], {"w": curvature.layer("0.weight")}, estimator="exact")
    assert np.isnan(found.stderr["w"]).all() and found.reliability is None


def test_auto_draws_pairs_where_few_examples_matter_and_sketches_otherwise() -> None:
    model, (x, y) = smooth(), images(4, count=32)
    asked = {"w": curvature.layer("0.weight")}
    assert curvature.estimate(model, F.cross_entropy, [(x, y)], asked).estimator == "sketch"
    sure = nn.Sequential(*model, Flow(lambda m, z: z * torch.linspace(1, 400, len(z))[:, None]))
    with pytest.raises(ValueError, match="mixes the examples"):
        curvature.estimate(sure, F.cross_entropy, [(x, y)], asked)
    x[2:] *= 1e3
    assert curvature.estimate(model, F.cross_entropy, [(x, y)], asked).estimator == "pairs"


def state(model: nn.Module) -> list[Any]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    values = [(n, t.clone(), t.requires_grad, t.grad) for n, t in (*model.named_parameters(), *model.named_buffers())]
    return [hooks, [v[0] for v in values], [v[1] for v in values], [v[2:] for v in values]]


def same(a: list[Any], b: list[Any]) -> bool:
    return a[0] == b[0] and a[1] == b[1] and all(torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True)) and a[3] == b[3]


@pytest.mark.parametrize("estimator", ["exact", "hessian", "controlled"])
@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was_found(estimator: str, failing: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Tanh(), nn.Linear(4, 3)).double().train()
    model[2].eval()
    model[0].bias.requires_grad_(False)
    before, mode = state(model), torch.is_grad_enabled()
    asked = {"b": curvature.layer("0.bias"), "w": curvature.layer("4.weight"), "a": curvature.Activation("3")}
    x, y = images(4)
    batches = [(x, y), (x[:, :3] if failing else x, y)]

    def run() -> None:
        curvature.estimate(model, F.cross_entropy, batches, asked, estimator=estimator)

    if failing:
        with pytest.raises(RuntimeError):
            run()
    else:
        run()
    assert same(before, state(model)) and torch.is_grad_enabled() == mode


def test_curvature_is_asked_for_within_no_grad_as_well() -> None:
    model, batch = smooth(), images(4)
    asked = {"w": curvature.layer("0.weight")}
    for estimator in ("exact", "hessian"):
        plain = curvature.estimate(model, F.cross_entropy, [batch], asked, estimator=estimator)
        with torch.no_grad():
            inside = curvature.estimate(model, F.cross_entropy, [batch], asked, estimator=estimator)
        np.testing.assert_array_equal(plain.mean["w"], inside.mean["w"])
