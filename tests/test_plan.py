"""An incoherent plan cannot be written down, and a foreign file is refused."""

from __future__ import annotations

import json

import pytest
from zoo import make

from curvepress.plan import Plan, from_json, to_json
from curvepress.structure import Structure
from curvepress.tracing.watching import trace


def structure_of(name: str = "vgg") -> Structure:
    case = make(name)
    return trace(case.model, *case.example)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nowhere": (0,)}, "no such group; the groups are features.0"),
        ({"features.0": ()}, "at least one; got"),
        ({"features.0": (0, 0)}, "distinct"),
        ({"features.0": (0, 6)}, r"in \[0, 6\)"),
        ({"features.0": (-1, 2)}, r"in \[0, 6\)"),
        ({"features.0": (0.5,)}, "must be distinct channels"),
        ({"classifier.3": (0, 1)}, "cannot be cut: model output"),
    ],
)
def test_incoherent_plans_are_refused(keep: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(structure_of(), keep)


def test_order_does_not_matter_and_keeping_all_is_keeping_nothing_back() -> None:
    structure = structure_of()
    assert Plan(structure, {"features.0": (3, 1), "features.4": tuple(range(8))}) == Plan(structure, {"features.0": (1, 3)})


def test_the_json_is_read_by_people() -> None:
    lines = to_json(Plan(structure_of(), {"features.0": (0, 2)})).splitlines()
    assert '  "features.0": [0, 2]' in lines
    assert max(map(len, lines)) < 160


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: {**d, "version": 99}, "of version 2 or 3; got"),
        (lambda d: {**d, "bits": {"weights": {}}}, "the bits of the plan are damaged"),
        (lambda d: {**d, "format": "x"}, "not a curvepress plan"),
        (lambda d: {**d, "keep": [1]}, "must map groups to lists"),
        (lambda d: {**d, "keep": {"features.0": [99]}}, r"in \[0, 6\)"),
        (lambda d: {**d, "structure": {}}, "not the JSON of a structure"),
        (lambda d: {k: v for k, v in d.items() if k != "structure"}, "not the JSON of a structure"),
        (lambda d: [d], "got list"),
    ],
)
def test_foreign_json_is_refused(damage: object, message: str) -> None:
    data = json.loads(to_json(Plan(structure_of())))
    with pytest.raises(ValueError, match=message):
        from_json(json.dumps(damage(data)))


def test_damaged_json_and_rows_that_do_not_fit_are_refused() -> None:
    text = to_json(Plan(structure_of()))
    with pytest.raises(ValueError, match="the JSON is damaged"):
        from_json(text[:-20])
    data = json.loads(text)
    data["structure"]["groups"][0]["members"][0]["start"] = 4
    with pytest.raises(ValueError, match="do not fit shape"):
        from_json(json.dumps(data))
