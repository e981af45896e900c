"""The records of the benchmark of transformers as Markdown and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import records
from benchmarks.transformers_models import FILE, SPEEDS, file_of

ORDER = ("none", "random", "magnitude", "nvit", "michel", "hessian_trace", "mask_curvature", "reconstruction")
HEADINGS = {
    "heads": "heads gone",
    "encoder": "of the encoder's parameters",
    "encoder, not repaired": "of the encoder's parameters, not repaired",
}
STAGES = ("before", "repaired", "after")
Speeds = dict[tuple[str, str], Any]


def table() -> None:
    """Print the tables in Markdown."""
    rows, speeds = records.read(FILE), {(r["task"], r["model"]): r for r in records.read(SPEEDS)}
    wholes = {r["task"]: r for r in rows if r["what"] == "original"}
    for task, whole in wholes.items():
        own = [r for r in rows if r["task"] == task]
        print(f"\n**{task}**: {whole['after']['accuracy']:.2f} %, {whole['params']:,} parameters, {whole['macs'] / 1e6:.1f} M MACs")
        for heading in HEADINGS if task == "sst2" else ("latency at most",):
            some = [r for r in own if "method" in r and "share" in r and (task != "sst2" or r["what"] == heading)]
            if some:
                _print(HEADINGS.get(heading, heading), some, whole, speeds)
        _lead(own)
        _recoveries([r for r in own if r["what"] == "recovery"])
        _choices([r for r in own if r["what"] == "choice"])
    _milliseconds(speeds)


def _print(heading: str, rows: list[records.Record], whole: records.Record, speeds: Speeds) -> None:
    several = len({r["what"] for r in rows}) > 1
    first = ["cut", heading] if several else [heading]
    columns = [*first, "score", "seeds", "parameters", "MACs", "pruned, %", "repaired, %", "recovered, %", "latency, batch 1", "batch 16"]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    kinds = list(dict.fromkeys(r["what"] for r in rows))
    place = lambda k: (kinds.index(k[0]), k[1] * (-1 if several else 1), ORDER.index(k[2]))  # noqa: E731
    keys = sorted({(r["what"], r["share"], r["method"]) for r in rows}, key=place)
    for what, share, method in keys:
        own = [r for r in rows if (r["what"], r["share"], r["method"]) == (what, share, method)]
        cells = [*([what] if several else []), f"{share:.0%}", method, str(len(own)), *_cells(own, whole, speeds)]
        print("| " + " | ".join(cells) + " |")


def _cells(own: list[records.Record], whole: records.Record, speeds: Speeds) -> list[str]:
    if "failure" in own[0]:
        return ["cannot be reached", *["–"] * 6]
    sizes = [f"{mean(r[k] for r in own) / whole[k]:.1%}" for k in ("params", "macs")]
    accuracies = [_spread([r[k]["accuracy"] for r in own]) if k in own[0] else "–" for k in STAGES]
    raced = speeds.get((own[0]["task"], file_of({**own[0], "seed": 0})))
    return [*sizes, *accuracies, *(_quartiles(raced[f"ratio{b}"]) if raced else "–" for b in (1, 16))]


def _lead(rows: Sequence[records.Record]) -> None:
    """By how much curvature is ahead of scores by gradients, in points of accuracy over the seeds that both have."""
    found = {(r["what"], r["method"], r["share"], r["seed"]): r for r in rows if "method" in r and "before" in r}
    lines = []
    for what, share, stages in (("heads", 0.6, STAGES[::2]), ("encoder", 0.4, STAGES), ("encoder, not repaired", 0.4, STAGES[2:])):
        for method in ("michel", "nvit"):
            seeds = [n for w, m, s, n in found if (w, m, s) == (what, method, share) and (w, "mask_curvature", s, n) in found]
            pairs = [(found[what, "mask_curvature", share, n], found[what, method, share, n]) for n in seeds]
            ahead = {k: mean(a[k]["accuracy"] - b[k]["accuracy"] for a, b in pairs) for k in stages if pairs}
            cells = [f"{ahead[k]:+.2f}" if k in ahead else "–" for k in STAGES]
            lines += [f"| {what} | {method} | {len(seeds)} | " + " | ".join(cells) + " |"] if seeds else []
    if lines:
        print("\n| points ahead | of | seeds | pruned | repaired | recovered |\n|---|---|---|---|---|---|", *lines, sep="\n")


def _choices(rows: Sequence[records.Record]) -> None:
    if rows:
        print("\n| score | divided by | validation after repair, % |\n|---|---|---|")
        for r in sorted(rows, key=lambda r: (ORDER.index(r["method"]), r["per"])):
            print(f"| {r['method']} | {'nothing' if r['per'] == 'channel' else 'MACs saved'} | {r['validation']['accuracy']:.2f} |")


def _recoveries(rows: Sequence[records.Record]) -> None:
    if rows:
        print("\n| learning rate | learnt from the original | validation, % | loss |\n|---|---|---|---|")
        for r in rows:
            print(f"| {r['lr']:g} | {r['distill']:.0%} | {r['validation']['accuracy']:.2f} | {r['validation']['loss']:.3f} |")


def _milliseconds(speeds: Speeds) -> None:
    """What the originals take, to which latencies are set in relation."""
    for (task, name), r in speeds.items():
        if name == "original":
            print(f"\n{task}, original: {r['ms1']:.2f} ms at batch 1, {r['ms16']:.2f} ms at batch 16")


def _quartiles(ratio: list[float]) -> str:
    return f"{ratio[1]:.2f} ({ratio[0]:.2f}–{ratio[2]:.2f})"


def _spread(values: list[float]) -> str:
    half = (max(values) - min(values)) / 2
    return f"{mean(values):.2f}" + (f" ± {half:.2f}" if len(values) > 1 else "")


def plot(path: Path) -> None:
    """Draw the vision transformer's accuracy against its measured latency, by what was cut."""
    from matplotlib import pyplot

    rows = [r for r in records.read(FILE) if r["task"] == "cifar10_vit" and "failure" not in r]
    speeds = {r["model"]: r for r in records.read(SPEEDS) if r["task"] == "cifar10_vit"}
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    whole = next(r for r in rows if r["what"] == "original")
    axes.plot(1, whole["after"]["accuracy"], "k*", label="original")
    for what in dict.fromkeys(r["what"] for r in rows if r.get("method") == "mask_curvature"):
        own = [r for r in rows if (r["what"], r.get("method"), r.get("seed")) == (what, "mask_curvature", 0) and file_of(r) in speeds]
        points = sorted((speeds[file_of(r)]["ratio1"][1], r["after"]["accuracy"]) for r in own)
        axes.plot(*zip(*points, strict=True), "o-", label=what)
    axes.set(xlabel="latency in ONNX Runtime, batch 1, of the original's", ylabel="test accuracy, %")
    axes.legend()
    figure.savefig(path)
