"""Where curvepress's own way is ahead of the published systems and of the baselines, and where it is behind, from the same records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks import records
from benchmarks.reproduce_channels import OURS

Rows = list[records.Record]
CLOSE = 0.5


@dataclass(frozen=True)
class Contest:
    """One budget: mean test accuracy of our way and of the best other, over the seeds that each has, in percent."""

    part: str
    network: str
    budget: str
    ours: float
    best: float
    by: str
    seeds: int

    @property
    def lead(self) -> float:
        """Ours less the best other."""
        return self.ours - self.best


Entry = tuple[str, str, str, float]
"""Network, budget, way, accuracy."""


def _channels(r: records.Record) -> Entry:
    return r["network"], f"{1 - r['left']:.0%} of the parameters gone", r["way"], r["accuracy"]


def _heads(r: records.Record) -> Entry:
    return "MiniLM", f"{r['share']:.0%} of the heads gone", r["method"], r["after"]["accuracy"]


def _bits(r: records.Record) -> Entry:
    return r["network"], f"{r['ratio']:g} times fewer bytes, {'trained' if r['eighths'] else 'calibrated'}", r["way"], r["accuracy"]


def _pipeline(r: records.Record) -> Entry:
    way = "curvepress" if r["command"].startswith("compress") else "EHAP"
    return r["network"], f"{1 - r['left']:.0%} of the parameters gone, 8 bits", way, r["stages"][-1]["test"]["accuracy"]


def _transformer(r: records.Record) -> Entry:
    return "ViT", f"{r['left']:.0%} of the latency", r["way"], r["stages"][-1]["test"]["accuracy"]


PARTS: Mapping[str, tuple[str, Callable[[records.Record], Entry], str, Callable[[str], bool]]] = {
    "hap": ("HAP", _channels, OURS, lambda way: not way.startswith("curvepress")),
    "heads": ("HAP, heads", _heads, "mask_curvature", lambda way: way not in ("mask_curvature", "none")),
    "pipeline": ("EHAP", _pipeline, "curvepress", lambda way: way != "curvepress"),
    "hawq": ("HAWQ-V2", _bits, "curvepress, direction", lambda way: not way.startswith("curvepress")),
    "nvit": ("NViT", _transformer, "curvature, our planner, repaired", lambda way: "our planner" not in way),
}
"""Its name, how a record is read, which way is ours, and which others count."""


def contests(found: Mapping[str, Rows]) -> Iterator[Contest]:
    """One for every budget at which there is our way and another."""
    for part, (name, read, mine, counts) in PARTS.items():
        entries = [read(r) for r in found[part]]
        for network, budget in dict.fromkeys(e[:2] for e in entries):
            own: dict[str, list[float]] = {}
            for _, _, way, accuracy in (e for e in entries if e[:2] == (network, budget)):
                own.setdefault(way, []).append(accuracy)
            others = {way: mean(a) for way, a in own.items() if counts(way)}
            if mine in own and others:
                best = max(others, key=lambda way: others[way])
                yield Contest(name, network, budget, mean(own[mine]), others[best], best, min(len(own[mine]), len(own[best])))


def verdict(found: Mapping[str, Rows], table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]) -> str:
    """A sentence of counts, and every contest in a table, those in which our way is behind in bold."""
    rows = list(contests(found))
    behind, close, once = sum(c.lead < 0 for c in rows), sum(abs(c.lead) < CLOSE for c in rows), sum(c.seeds == 1 for c in rows)
    said = (
        f"At {len(rows)} budgets there is curvepress's own way beside published systems or baselines, with the same recovery. "
        f"It is level with the best of them or ahead at {len(rows) - behind}, and behind at {behind} (in bold). "
        f"At {close} the difference is less than {CLOSE:g} points, {once} are of one seed, and the best of several others is a hard mark."
    )
    lines = []
    for c in rows:
        lead = f"{c.lead:+.2f}"
        lines.append(
            [c.part, c.network, c.budget, f"{c.ours:.2f}", f"{c.best:.2f}", c.by, f"**{lead}**" if c.lead < 0 else lead, str(c.seeds)]
        )
    return f"{said}\n\n{table(('system', 'network', 'budget', 'curvepress, %', 'best other, %', 'which', 'lead', 'seeds'), lines)}"
