"""Transformers: heads of MiniLM on SST-2 by every score, its encoder by all dimensions, and a vision transformer against latency.

    python -m benchmarks.transformers heads --seeds 0 1     # 20, 40 and 60 % of the heads; resumes
    python -m benchmarks.transformers encoder --seeds 0 1   # 60 % of the encoder's parameters, by all dimensions
    python -m benchmarks.transformers vit                   # all dimensions, MLPs only, heads only, under latency budgets
    python -m benchmarks.transformers latency               # ONNX Runtime, pruned classifiers of sentences against the original in turns
    python -m benchmarks.transformers table                 # prints the tables of docs/transformers.md

Accuracy is that of SST-2's dev sentences and of CIFAR-10's test images, at which nothing but these tables looks.  Every model gets the
same short recovery; where all dimensions go, it is repaired in closed form first, as ``compress`` does it.  Needs the data of the recipes
``sst2`` and ``cifar10`` (``CURVEPRESS_DATA``) and their trained weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks import records
from curvepress.artifacts import load_scores, save_scores
from curvepress.costs import cost
from curvepress.export import compare_latency, to_onnx
from curvepress.plan import Plan, tensors_after
from curvepress.planner import at_most, search
from curvepress.repairing import repair
from curvepress.scores import Scores, score
from curvepress.structure import Structure
from curvepress.surgery import applied
from curvepress.tracing import trace
from curvepress.training import fit
from curvepress_recipes import cifar10_vit, sst2

HERE, MODELS = Path(__file__).parent / "results", Path("runs/benchmarks/transformers")
FILE, SPEEDS = HERE / "transformers.jsonl", HERE / "transformers_latency.jsonl"
METHODS = ("mask_curvature", "michel", "magnitude", "random")
WIDE = ("mask_curvature", "reconstruction", "michel", "nvit", "magnitude", "random")
"""Scores of all dimensions.  Michel's and NViT's are those by gradients."""
ORDER = ("random", "magnitude", "nvit", "michel", "hessian_trace", "mask_curvature", "reconstruction")
GONE = (0.2, 0.4, 0.6)
ENCODER, KEPT = "encoder.encoder.", 0.4
MULTIPLES = {"embedding": 16, "hidden": 16, "query-key": 8, "value": 8}
SAMPLES = 16
CUTS = {"all dimensions": (), "MLPs": ("embedding", "head", "query-key", "value"), "heads": ("embedding", "hidden", "query-key", "value")}
SHARES = (0.85, 0.7, 0.5)
LIMIT: dict[str, int] = {"models": 0}
NEW: list[dict[str, Any]] = []
"""How many models this process may measure (0: all), and those that it has."""
LENGTH = 32
"""Words of the sentences whose latency is measured."""


@dataclass(frozen=True)
class Task:
    """A recipe, what is drawn for its recovery, and a batch to time."""

    recipe: ModuleType
    drawn: Callable[[int], Any]
    timed: Callable[[], Any]

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.recipe.__name__.rpartition(".")[2]


def _images(seed: int) -> Any:
    """6,400 training images, augmented."""
    return [b for b, _ in zip(cifar10_vit.batches("train", seed), range(50), strict=False)]


def _sentence() -> dict[str, Tensor]:
    ids = torch.arange(1000, 1000 + LENGTH)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


TEXT = Task(sst2, lambda seed: sst2.batches("train", seed, examples=1600), _sentence)
VISION = Task(cifar10_vit, _images, cifar10_vit.example)


@cache
def original(task: Task) -> tuple[nn.Module, Structure]:
    """The trained model, its structure; its own figures are recorded."""
    model = task.recipe.model()
    structure = trace(model, task.recipe.example())
    records.once(
        FILE, {"task": task.name, "what": "original"}, lambda: {"after": task.recipe.evaluate(model, "test"), **_sizes(Plan(structure))}
    )
    return model, structure


def scored(task: Task, method: str, seed: int) -> Scores:
    """The scores of every channel, kept in a folder."""
    model, structure = original(task)
    folder = MODELS / f"{task.name}-{method}-{seed}"
    if not (folder / "scores.json").exists():
        batches = task.recipe.batches("calibration", seed=seed)
        folder.mkdir(parents=True, exist_ok=True)
        save_scores(score(model, task.recipe.loss, batches, structure, method=method, samples=SAMPLES, seed=seed), folder)
    return load_scores(folder)


def measured(task: Task, key: dict[str, Any], plan: Callable[[], Plan], *, refit: bool = False) -> None:
    """Prune, test, repair if ``refit``, recover, test: once."""

    def row() -> dict[str, Any]:
        NEW.append(key)
        model, _ = original(task)
        made = applied(model, chosen := plan(), task.recipe.example())
        found = {"before": task.recipe.evaluate(made.model, "test")}
        start = made.model
        if refit:
            start = repair(made.model, model, task.recipe.batches("calibration", seed=key["seed"]), chosen).model
            found["repaired"] = task.recipe.evaluate(start, "test")
        how = {"epochs": 1, "lr": RATES[task.name], "optimizer": "adamw", "weight_decay": 0.01, "clip_norm": 1.0, "seed": key["seed"]}
        small = fit(start, task.recipe.loss, task.drawn, teacher=model, distill_weight=0.5, precision=PRECISIONS[task.name], **how).model
        return {**found, "after": task.recipe.evaluate(small, "test"), "form": made.form, **_sizes(chosen)}

    record = records.once(FILE, {"task": task.name, **key}, row)
    print({**key, "before": record["before"]["accuracy"], "after": record["after"]["accuracy"]}, flush=True)
    if 0 < LIMIT["models"] <= len(NEW):
        raise SystemExit(f"{len(NEW)} models measured; the same command goes on")


RATES = {"sst2": 5e-5, "cifar10_vit": 5e-4}
PRECISIONS = {"sst2": "bfloat16", "cifar10_vit": "full"}


def _file(key: dict[str, Any]) -> str:
    return "-".join(str(key[k]).replace(" ", "_") for k in ("what", "method", "share"))


def _sizes(plan: Plan) -> dict[str, Any]:
    tensors = tensors_after(plan)
    encoder = sum(prod(t.shape) for n, t in tensors.items() if n.startswith(ENCODER) and t.kind == "parameter")
    left = {k: [len(plan.keep.get(g.name, range(g.size))) for g in plan.structure.free if g.kind == k] for k in _kinds(plan.structure)}
    return {**vars(cost(plan)), "encoder": encoder, "left": left}


def _kinds(structure: Structure) -> list[str]:
    return sorted({g.kind for g in structure.free})


def heads(seeds: list[int], methods: list[str]) -> None:
    """Shares of all heads, the lowest scores first; one of each layer stays."""
    for seed in seeds:
        for share in GONE[::-1]:
            for method in methods or METHODS:
                key = {"what": "heads", "method": method, "share": share, "seed": seed}
                measured(TEXT, key, lambda method=method, share=share, seed=seed: _fewer_heads(method, share, seed))


def _fewer_heads(method: str, share: float, seed: int) -> Plan:
    _, structure = original(TEXT)
    groups = [g for g in structure.free if g.kind == "head"]
    whole = cost(Plan(structure)).params
    one = whole - cost(Plan(structure, {groups[0].name: tuple(range(1, groups[0].size))})).params
    budget = at_most(params=whole - round(share * sum(g.size for g in groups)) * one)
    return search(structure, scored(TEXT, method, seed), budget, floor=0, whole=[k for k in _kinds(structure) if k != "head"])


def encoder(seeds: list[int], methods: list[str]) -> None:
    """All dimensions, until 60 % of the encoder's parameters are gone."""
    for seed in seeds:
        for method in methods or WIDE:
            key = {"what": "encoder", "method": method, "share": KEPT, "seed": seed}
            measured(TEXT, key, lambda method=method, seed=seed: _smaller_encoder(method, seed), refit=True)


def _smaller_encoder(method: str, seed: int) -> Plan:
    """The first plan, as its multiply-accumulates fall, whose encoder has few enough parameters.

    Worth is per multiply-accumulate, which the table of words has none of: it is no part of the encoder.
    """
    _, structure = original(TEXT)
    scores, whole = scored(TEXT, method, seed), _sizes(Plan(structure))["encoder"]
    low, high = 0.05, 0.7
    while high - low > 0.005:
        middle = (low + high) / 2
        plan = search(structure, scores, at_most(macs=middle), per="macs", multiple=MULTIPLES, aligned=True)
        low, high = (middle, high) if _sizes(plan)["encoder"] <= KEPT * whole else (low, middle)
    return search(structure, scores, at_most(macs=low), per="macs", multiple=MULTIPLES, aligned=True)


def vit(seeds: list[int], methods: list[str]) -> None:
    """Which dimensions may go, at equal multiply-accumulates, as far as each goes."""
    _, structure = original(VISION)
    for method in methods or ("mask_curvature",):
        for what, whole in CUTS.items():
            for share in SHARES:
                options: dict[str, Any] = {"per": "macs", "whole": whole, "multiple": {"embedding": 8, "hidden": 16}, "aligned": True}
                for seed in seeds:
                    key = {"what": what, "method": method, "share": share, "seed": seed}
                    try:
                        search(structure, scored(VISION, method, seed), at_most(macs=share), **options)
                    except ValueError as error:
                        print(f"{key}: {error}", flush=True)
                        continue
                    plan = lambda m=method, s=share, n=seed, o=options: search(structure, scored(VISION, m, n), at_most(macs=s), **o)  # noqa: E731
                    measured(VISION, key, plan)


def latency(seeds: list[int], methods: list[str]) -> None:
    """Every exported model against its original, interleaved on one thread, batch 1 and 16."""
    for task in (TEXT, VISION):
        folder = MODELS / task.name
        for path in sorted(folder.glob("*-*.onnx")):
            whole = folder / "original.onnx"
            if not whole.exists():
                to_onnx(original(task)[0], task.recipe.example(), whole)
            records.once(
                SPEEDS, {"task": task.name, "model": path.stem}, lambda task=task, path=path, whole=whole: _raced(task, whole, path)
            )
            print(task.name, path.stem, flush=True)


def _raced(task: Task, whole: Path, path: Path) -> dict[str, Any]:
    example = tree_map(Tensor.numpy, task.timed())
    found = compare_latency({"original": whole, "small": path}, example, batches=(1, 16), seconds=6.0)
    return {f"{t.name}{t.batch}": t.wall.median for t in found} | {
        f"ratio{t.batch}": [t.ratio.low, t.ratio.median, t.ratio.high] for t in found if t.name == "small"
    }


def table(seeds: list[int], methods: list[str]) -> None:
    """Print the tables in Markdown."""
    rows, speeds = records.read(FILE), {(r["task"], r["model"]): r for r in records.read(SPEEDS)}
    wholes = {r["task"]: r for r in rows if r["what"] == "original"}
    for task, whole in wholes.items():
        print(f"\n**{task}**: {whole['after']['accuracy']:.2f} %, {whole['params']:,} parameters, {whole['macs'] / 1e6:.1f} M MACs")
        for what in dict.fromkeys(r["what"] for r in rows if r["task"] == task and r["what"] != "original"):
            _print(task, what, [r for r in rows if (r["task"], r["what"]) == (task, what)], whole, speeds)


def _print(task: str, what: str, rows: list[records.Record], whole: records.Record, speeds: dict[tuple[str, str], Any]) -> None:
    share = {"heads": "heads gone", "encoder": "of the encoder's parameters"}.get(what if task == "sst2" else "", "MACs at most")
    print(f"\n{what}:\n\n| {share} | score | seeds | parameters | MACs | pruned, % | recovered, % | latency, batch 1 | batch 16 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for one, method in sorted({(r["share"], r["method"]) for r in rows}, key=lambda k: (k[0], ORDER.index(k[1]))):
        own = [r for r in rows if (r["share"], r["method"]) == (one, method)]
        sizes = [f"{mean(r[k] for r in own) / whole[k]:.1%}" for k in ("params", "macs")]
        accuracies = [_spread([r[k]["accuracy"] for r in own]) for k in ("before", "after")]
        raced = speeds.get((task, _file({**own[0]})))
        times = [_quartiles(raced[f"ratio{b}"]) if raced else "–" for b in (1, 16)]
        print(" | ".join(["", f"{one:.0%}", method, str(len(own)), *sizes, *accuracies, *times, ""]).strip())


def _quartiles(ratio: list[float]) -> str:
    return f"{ratio[1]:.2f} ({ratio[0]:.2f}–{ratio[2]:.2f})"


def _spread(values: list[float]) -> str:
    half = (max(values) - min(values)) / 2
    return f"{mean(values):.2f}" + (f" ± {half:.2f}" if len(values) > 1 else "")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("heads", "encoder", "vit", "latency", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--models", type=int, default=0, help="measure so many at most in this process; 0 is all")
    given = parser.parse_args()
    LIMIT["models"] = given.models
    torch.set_num_threads(1)
    {"heads": heads, "encoder": encoder, "vit": vit, "latency": latency, "table": table}[given.what](given.seeds, given.methods)


if __name__ == "__main__":
    main()
