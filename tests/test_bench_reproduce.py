"""The results page: written from records, complete about what is missing; the systems' page is what the presets say now."""

from benchmarks import reproduce_channels, reproduce_page
from curvepress.reproduce import SYSTEMS

HAP = {
    "part": "hap",
    "network": "ResNet-20",
    "left": 0.5,
    "way": "HAP, corrected",
    "epochs": 1,
    "params": 0.5,
    "macs": 0.6,
    "gone": 0.3,
    "pointwise": 0.0,
}


def test_the_systems_page_is_what_the_presets_say():
    written = (reproduce_page.DOCS / "reproduce.md").read_text(encoding="utf-8")
    assert written == reproduce_page.systems(reproduce_page.gathered()), "run python -m benchmarks.reproduce_page write"
    for preset in SYSTEMS.values():
        assert all(f"| `{name}` |" in written for name in preset.settings) and all(p.value in written for p in preset.published)
        assert all(u in written for u in preset.unread) and all(c.reason in written for c in preset.corrections.values())


def test_rows_are_means_over_seeds_with_half_their_spread():
    rows = [{**HAP, "seed": seed, "pruned": 40.0 + seed, "accuracy": 85.0 + seed} for seed in (0, 1)]
    line = next(row for row in reproduce_page.channels(rows).splitlines() if "HAP, corrected" in row)
    assert line == "| 50% | HAP, corrected | 2 | 40.50 ± 0.50 | 85.50 ± 0.50 | 50.0 ± 0.0 | 60.0 ± 0.0 | 30.0 ± 0.0 | 0.0 ± 0.0 |"


def test_what_was_not_measured_is_said():
    empty = {part: [] for part, _, _ in reproduce_page.SECTIONS}
    page = reproduce_page.results(empty)
    assert page.count("Not measured.") == len(empty) and "no GPU has trained them" in page
    cells = [key for _, key, _ in reproduce_channels.cells() if key["part"] == "hap"]
    assert f"{len(cells)} of `hap`" in page
    one = {**empty, "hap": [{**cells[0], "pruned": 1.0, "accuracy": 2.0, "params": 0.5, "macs": 0.5}]}
    assert f"{len(cells) - 1} of `hap`" in reproduce_page.results(one)


def test_rows_of_other_scripts_are_borrowed_once():
    known = [(r["network"], r["seed"], r["left"], r["way"]) for r in reproduce_channels.borrowed()]
    own = [(k["network"], k["seed"], k["left"], k["way"]) for _, k, _ in reproduce_channels.cells() if k["part"] == "hap"]
    assert known and not set(known) & set(own) and len(set(known)) == len(known)
