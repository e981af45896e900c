"""The results page and the page of each published system, written from records and presets: nothing on them is typed by hand.

python -m benchmarks.reproduce_page write     # docs/results.md, docs/reproduce.md and docs/results-*.svg
python -m benchmarks.reproduce_page table     # prints the results
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import records, reproduce, reproduce_plots
from benchmarks.cifar10 import spread
from benchmarks.reproduce_channels import AGREED, LEFT, NETS, SHOWN, TRACES, borrowed, passes
from benchmarks.reproduce_pipelines import VIT
from benchmarks.reproduce_verdict import verdict
from curvepress.files import write_text
from curvepress.reproduce import SYSTEMS, Preset

DOCS, HERE = Path(__file__).parent.parent / "docs", Path(__file__).parent / "results"
Rows = list[records.Record]
DOTS = "–"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(["| " + " | ".join(r) + " |" for r in (heads, ["---"] * len(heads), *lines)])


def channels(rows: Rows) -> str:
    """HAP beside other ways at equal parameters, for each network."""
    parts = []
    for network in (n for n in NETS if any(r["network"] == n for r in rows)):
        lines = []
        for left, way in ((left, way) for left in LEFT for way in SHOWN):
            own = [r for r in rows if (r["network"], r["left"], r["way"]) == (network, left, way)]
            if own:
                shares = [spread([100 * r[k] for r in own if k in r], "{:.1f}") for k in ("params", "macs", "gone", "pointwise")]
                lines.append(
                    [f"{1 - left:.0%}", way, str(len(own)), *(spread([r[k] for r in own]) for k in ("pruned", "accuracy")), *shares]
                )
        heads = ("parameters gone", "way", "seeds", "untrained, %", "fine-tuned, %", "parameters, %", "MACs, %")
        more = ("channels gone, %", "1x1, %")
        parts.append(f"**{network}**\n\n{table((*heads, *more), lines)}")
    return "\n\n".join(parts)


def agreement(rows: Rows) -> str:
    """Half-precision traces beside full ones."""
    lines = []
    for network, name in ((d, n) for d in dict.fromkeys(r["network"] for r in rows) for n in passes(d)):
        own = [r["rows"][name] for r in rows if r["network"] == network]
        same = [spread([o["same gone"][str(left)] for o in own], "{:.3f}") for left in AGREED]
        ranks = [spread([o[k] for o in own], "{:.4f}") for k in ("spearman with full", "spearman with exact")]
        lines.append([network, name, str(len(own)), *ranks, *same, spread([o["negative"] for o in own], "{:.3f}")])
    same_heads = [f"same channels gone, {1 - left:.0%} of parameters" for left in AGREED]
    return table(("network", "passes", "seeds", "ρ with full", "ρ with exact", *same_heads, "negative traces"), lines)


def halves(rows: Rows) -> str:
    """What networks chosen by half-precision traces reach."""
    lines = []
    keys = {(r["network"], r["left"], r["trace"]) for r in rows}
    for network, left, name in sorted(keys, key=lambda k: ([*NETS].index(k[0]), -k[1], TRACES.index(k[2]))):
        own = [r for r in rows if (r["network"], r["left"], r["trace"]) == (network, left, name)]
        lines.append([network, f"{1 - left:.0%}", name, str(len(own)), *(spread([r[k] for r in own]) for k in ("pruned", "accuracy"))])
    return table(("network", "parameters gone", "passes", "seeds", "untrained, %", "fine-tuned, %"), lines)


def stages(rows: Rows) -> str:
    """EHAP's pipeline, stage by stage."""
    parts = []
    for r in rows:
        whole, times = r["stages"][0], list(r["stages"][0]["latency"])
        lines = [
            [
                s["stage"],
                f"{s['validation']['accuracy']:.2f}",
                f"{s['test']['accuracy']:.2f}" if s["test"] else DOTS,
                *(f"{s[k]:,}" for k in ("params", "macs", "bytes")),
                f"{whole['bytes'] / s['bytes']:.1f}",
                *(_quartiles(s["latency"].get(b)) for b in times),
            ]
            for s in r["stages"]
        ]
        heads = ("stage", "validation, %", "test, %", "parameters", "MACs", "bytes", "times fewer", *(f"latency, batch {b}" for b in times))
        parts.append(f"`curvepress {r['command']}`\n\n{table(heads, lines)}")
    return "\n\n".join(parts)


def _quartiles(ratio: Sequence[float] | None) -> str:
    return DOTS if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})"


def bits(rows: Rows) -> str:
    """HAWQ-V2 beside other choices of bits."""
    lines = []
    keys = dict.fromkeys((r["network"], r["ratio"], r["way"]) for r in sorted(rows, key=lambda r: (r["network"], r["ratio"])))
    for network, ratio, way in keys:
        own = {r["eighths"]: r for r in rows if (r["network"], r["ratio"], r["way"]) == (network, ratio, way)}
        first = own.get(0) or next(iter(own.values()))
        accuracies = [next((f"{r['accuracy']:.2f}" for e, r in own.items() if (e > 0) == trained), DOTS) for trained in (False, True)]
        sizes = [f"{first['float_bytes'] / first['bytes']:.2f}", f"{first['average']:.2f}", f"{first['bops'] / 1e9:.2f}"]
        given = "".join(map(str, first["chosen"]))
        lines.append([network, f"{ratio:g}", way, *accuracies, *sizes, f"`{given}`", f"{first['predicted']:.3g}"])
    heads = (
        "network",
        "asked",
        "way",
        "calibrated, %",
        "2/8 epoch, %",
        "times fewer bytes",
        "bits a weight",
        "Gbops",
        "bits, layer by layer",
    )
    return table((*heads, "predicted rise"), lines)


def transformer(rows: Rows) -> str:
    """NViT beside curvature at one latency budget."""
    lines, order = [], [way for way, _, _ in VIT]
    for r in sorted(rows, key=lambda r: order.index(r["way"])):
        whole, small = r["stages"][0], r["stages"][-1]
        sizes = [f"{small[k] / whole[k]:.1%}" for k in ("params", "macs")]
        accuracies = [f"{s['test']['accuracy']:.2f}" for s in (whole, small)]
        lines.append([r["way"], f"{r['left']:.0%}", *accuracies, *sizes, *(_quartiles(small["latency"].get(b)) for b in ("1", "64"))])
    return table(("way", "latency asked", "original, %", "1 epoch, %", "parameters", "MACs", "latency, batch 1", "batch 64"), lines)


def heads(rows: Rows) -> str:
    """Heads of MiniLM on SST-2, from the records of ``benchmarks.transformers``."""
    names = {"hessian_trace": "HAP's score", "mask_curvature": "curvepress, mask_curvature", "michel": "slopes (Michel et al.)"}
    lines = []
    for share, method in sorted({(r["share"], r["method"]) for r in rows}):
        own = [r for r in rows if (r["share"], r["method"]) == (share, method)]
        accuracies = [spread([r[k]["accuracy"] for r in own]) for k in ("before", "after")]
        lines.append([f"{share:.0%}", names.get(method, method), str(len(own)), *accuracies])
    return table(("heads gone", "score", "seeds", "pruned, %", "recovered, %"), lines)


def trained(rows: Rows) -> str:
    """Networks that a GPU trained."""
    lines = [[r["network"], r["settings"]["recipe"], f"{r['test']:.2f}", f"{r['minutes']:.0f}", r["device"]] for r in rows]
    return table(("network", "recipe", "test, %", "minutes", "device"), lines)


SECTIONS: Sequence[tuple[str, str, Callable[[Rows], str]]] = (
    ("hap", "HAP: channels by relative Hessian trace, with and without implants", channels),
    ("heads", "HAP: heads of a transformer", heads),
    ("agreement", "EHAP: half-precision traces against full ones", agreement),
    ("ehap", "EHAP: what networks chosen by them reach", halves),
    ("pipeline", "EHAP: the whole pipeline", stages),
    ("hawq", "HAWQ-V2: bits", bits),
    ("nvit", "NViT: a vision transformer under a latency budget", transformer),
    ("gpu", "Networks trained on a GPU", trained),
)
NOTES = {
    "hap": "Published figures are of networks that were trained and fine-tuned longer ([each system's page](reproduce.md)); these are "
    "comparable with one another only. *As released*: three random vectors on 336 images. *Corrected*: the exact trace on 512 images, "
    "which 300 vectors approach. curvepress's ways refit what is left in closed form before the fine-tune, after two of its scores "
    "(`reconstruction` at temperature 4). The fine-tune is one epoch on CIFAR-10 and five on the digits, where every seed is another "
    "network. Torch-Pruning crashes on groups that padded shortcuts couple, and the inner channels alone cannot leave a tenth. "
    "Accuracy on the test images; mean over seeds ± half the spread.",
    "heads": "MiniLM, the same short recovery for every score; printed also by `python -m benchmarks.transformers table`.",
    "agreement": "The same random vectors on the same images in every precision; *other vectors* is full precision again, which tells how "
    "much 32 of them settle at all; *released scale* is EHAP's, of which one vector is left. *Same channels* is the share of those that "
    "the full passes would remove. Times and memory of half precision need a GPU: not measured; on a processor "
    "float16 is so slow that the digits alone have it.",
    "pipeline": "Latency is over that of the original's file in ONNX Runtime, in turns on one thread (median, quartiles).",
    "hawq": "Weights of 2 to 8 bits at equal bytes, activations of 4 to 8 bits, rounded to the nearest, no exceptions for first and last "
    "layers; curvepress's choice is within the bit operations of HAWQ-V2's. Traces are without the noise of random vectors. Training is "
    "a quarter of an epoch, on the digits two epochs, with the float network as the teacher.",
    "nvit": "Latency budget and table in ONNX Runtime, batch 1, one thread; one epoch of AdamW, no teacher.",
    "gpu": "By `benchmarks.gpu_training`.",
}


def gathered() -> dict[str, Rows]:
    """All records of the page, by part."""
    found: dict[str, Rows] = {part: [] for part, _, _ in SECTIONS}
    for r in (*records.read(reproduce.FILE), *borrowed()):
        found[r["part"]].append(r)
    found["heads"] = [r for r in records.read(HERE / "transformers.jsonl") if (r.get("what"), r.get("task")) == ("heads", "sst2")]
    found["gpu"] = records.read(HERE / "gpu_training.jsonl")
    return found


def results(found: dict[str, Rows]) -> str:
    """The results page."""
    parts = [
        "# Results: the published systems beside curvepress\n\nWritten by `python -m benchmarks.reproduce_page write` from the records in "
        "`benchmarks/results/`; [what each system is](reproduce.md), [how to measure it again](../benchmarks/README.md)."
    ]
    for part, title, write in SECTIONS:
        body = (
            f"{NOTES[part]}\n\n{write(found[part])}"
            if part in NOTES and found[part]
            else write(found[part])
            if found[part]
            else "Not measured."
        )
        plot = f"\n\n![{title}](results-{part}.svg)" if part in reproduce_plots.PLOTS and found[part] else ""
        parts.append(f"## {title}\n\n{body}{plot}")
    parts.insert(1, f"## In short\n\n{verdict(found, table)}")
    return "\n\n".join([*parts, f"## What was left out\n\n{left_out(found)}", f"## Where it was measured\n\n{places(found)}"]) + "\n"


def left_out(found: dict[str, Rows]) -> str:
    """The cells that have no record, counted by part."""
    missing: dict[str, int] = {}
    for cell in reproduce.cells(()):
        if not any(all(r.get(k) == v for k, v in cell.key.items()) for r in found[cell.key["part"]]):
            missing[cell.key["part"]] = missing.get(cell.key["part"], 0) + 1
    listed = ", ".join(f"{count} of `{part}`" for part, count in missing.items()) or "none"
    absent = [] if found["gpu"] else [
        "PreResNet-29, WRN-28-8 and the networks with projections: no GPU has trained them yet; `benchmarks.gpu_training` does",
        "times and memory of half precision on a GPU",
    ]  # fmt: skip
    return "\n".join(
        [
            f"- Cells of the grid without a record: {listed} (`python -m benchmarks.reproduce list` names them).",
            *(f"- {a}." for a in absent),
        ]
    )


def places(found: dict[str, Rows]) -> str:
    """Commits, processors and versions of the records."""
    seen = [r["environment"] for rows in found.values() for r in rows if "environment" in r]
    names = ("commit", "processor", "threads", "torch", "onnxruntime", "torch-pruning")
    return table(("", "values"), [[n, ", ".join(dict.fromkeys(str(e[n]) for e in seen if n in e)) or DOTS] for n in names])


def systems(found: dict[str, Rows]) -> str:
    """The page of the published systems."""
    intro = (
        "# The published systems\n\n`curvepress reproduce hap|ehap|hawq-v2|nvit RECIPE --out FOLDER` runs a published system on your task, "
        "by the stages of [the main job](recipes.md) and with files of the same names; interrupted, the same command goes on. "
        "`--corrected` leaves out what is defective in the released code, and nothing else. Every stage's accuracy, parameters, "
        "multiply-accumulates, bytes and latency are in `reproduction.json`. Figures of ours are on the [results page](results.md). "
        "This page is written by `python -m benchmarks.reproduce_page write` from the presets that the commands run."
    )
    return "\n\n".join([intro, *(system(preset, found) for preset in SYSTEMS.values())]) + "\n"


EXAMPLES = {
    "hap": "curvepress reproduce hap digits --params 0.5 --epochs 5 --out runs/hap",
    "ehap": "curvepress reproduce ehap digits --params 0.5 --corrected --epochs 5 --qat-epochs 1 --out runs/ehap",
    "hawq-v2": "curvepress reproduce hawq-v2 digits --ratio 8 --out runs/hawq",
    "nvit": "curvepress reproduce nvit cifar10_vit --latency 60% --out runs/nvit",
}


def system(preset: Preset, found: dict[str, Rows]) -> str:
    """One published system: formula, settings with their sources, corrections, deviations, published figures and ours."""
    lines = []
    for name, value in preset.settings.items():
        right = preset.corrections.get(name)
        lines.append([f"`{name}`", _said(value), preset.sources[name], _said(right.value) if right else ""])
    reasons = "\n".join(f"- `{n}`: {c.reason}." for n, c in preset.corrections.items()) or "There is nothing to correct."
    published = table(("what", "published", "where it was read"), [[p.what, p.value, p.source] for p in preset.published])
    return "\n\n".join(
        [
            f"## {preset.title}\n\n{preset.paper}.",
            f"```\n{EXAMPLES[preset.name]}\n```",
            f"`{preset.formula}`",
            table(("setting", "value", "source", "corrected"), lines),
            f"**Corrected**\n\n{reasons}",
            "**Otherwise in any case**\n\n" + "\n".join(f"- {d}" for d in preset.deviations),
            f"**Published figures**\n\n{published}\n\nCould not be read, and is not guessed: {'; '.join(preset.unread)}.",
            f"**Ours**: {ours(preset.name, found)}",
        ]
    )


def ours(name: str, found: dict[str, Rows]) -> str:
    """Where our figures are."""
    parts = {"hap": ("hap", "heads"), "ehap": ("agreement", "ehap", "pipeline"), "hawq-v2": ("hawq",), "nvit": ("nvit",)}[name]
    titles = {part: title for part, title, _ in SECTIONS}
    return (
        "; ".join(f"[{titles[p]}](results.md) ({len(found[p])} records)" if found[p] else f"{titles[p]}: not measured" for p in parts) + "."
    )


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("write", "table"))
    found = gathered()
    if parser.parse_args().what == "table":
        return print(results(found))
    write_text(DOCS / "results.md", results(found))
    write_text(DOCS / "reproduce.md", systems(found))
    for part, draw in reproduce_plots.PLOTS.items():
        if found[part]:
            draw(found[part], DOCS / f"results-{part}.svg")
    return None


if __name__ == "__main__":
    main()
