"""Laws of the run folder: what is done stays done, what is out of date is noticed, and nobody is taken for somebody else."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from curvepress import files
from curvepress.metering import Taken, metered
from curvepress.runs.folder import FLOWS, Run, create, finish, is_done, objections, open_run, require, scratch, sweep

STAGES = tuple(FLOWS)


def done(run: Run, stage: str, settings: dict[str, object] | None = None, text: str = "") -> Run:
    """The run after a stage that writes its own name, and a text, to its files."""
    for name in FLOWS[stage].writes:
        (run.folder / name).write_text(f"{stage} {name} {text}")
    return finish(run, stage, settings or {}, Taken(1.0, 2.0, 3.0))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with all stages done."""
    run = create(tmp_path / "run", "digits", {})
    for stage in STAGES:
        run = done(run, stage)
    return run


def test_every_file_is_written_by_one_stage_before_it_is_read():
    written: set[str] = set()
    for flow in FLOWS.values():
        assert set(flow.reads) <= written
        assert not set(flow.writes) & written
        written |= set(flow.writes)


def test_a_run_is_read_back_as_it_was(run: Run):
    assert open_run(run.folder) == run
    assert list(run.stages) == list(STAGES)
    assert asdict(run.stages["fit"])["taken"] == {"cpu": 1.0, "wall": 2.0, "peak": 3.0}
    assert create(run.folder, "digits", {}) == run


def test_stages_are_in_their_order_in_whatever_order_they_were_done(run: Run):
    held = Run(run.folder, "digits", {}, {n: run.stages[n] for n in ("trace", "score", "apply")})
    assert list(done(held, "plan").stages) == ["trace", "score", "plan", "apply"]


def test_a_stage_is_done_as_long_as_nothing_changed(run: Run):
    assert all(is_done(run, stage, {}) for stage in STAGES)
    assert not is_done(run, "fit", {"lr": 1})
    assert not is_done(Run(run.folder, "digits", {}, {}), "fit", {})
    assert is_done(done(run, "fit", {"milestones": (1, 2)}), "fit", {"milestones": [1, 2]})


@pytest.mark.parametrize("name", [n for f in FLOWS.values() for n in f.writes])
def test_a_changed_or_missing_file_undoes_its_stage_and_its_readers(run: Run, name: str):
    touched = {stage for stage, flow in FLOWS.items() if name in (*flow.reads, *flow.writes)}
    (run.folder / name).write_text("changed")
    assert {stage for stage in STAGES if not is_done(run, stage, {})} == touched
    (run.folder / name).unlink()
    assert {stage for stage in STAGES if not is_done(run, stage, {})} == touched


def test_objections_name_settings_and_files(run: Run):
    run = done(run, "fit", {"lr": 0.1, "old": 1, "recipe": "a"})
    assert objections(run, "fit", {"lr": 0.1, "old": 1, "recipe": "a"}) == []
    found = objections(run, "fit", {"lr": 0.2, "new": [1], "recipe": "b"})
    assert found == ["lr was 0.1, now 0.2", "old was 1, now None", "the recipe's code has changed", "new was None, now [1]"]
    (run.folder / "model.safetensors").write_text("edited")
    (run.folder / "history.json").unlink()
    assert objections(run, "fit", {"lr": 0.1, "old": 1, "recipe": "a"}) == ["model.safetensors is not as the stage wrote it"]
    assert len(objections(run, "fit", {"lr": 0.2, "old": 1, "recipe": "a"})) == 2
    assert objections(Run(run.folder, "digits", {}, {}), "fit", {}) == []


def test_what_is_up_to_date_may_be_read(run: Run):
    for stage in STAGES:
        require(run, stage)


def test_what_is_missing_foreign_damaged_or_stale_may_not(run: Run):
    scores = run.folder / "scores.json"
    for spoil, message in (
        (lambda: scores.write_text("other"), r"scores.json is not as it was written: .*; run `curvepress score .*run` to make it"),
        (scores.unlink, r"scores.json is missing; run `curvepress score"),
    ):
        spoil()
        for stage in ("plan", "apply", "fit", "report"):  # plan.json stands on the scores, and they on it
            with pytest.raises(ValueError, match=message):
                require(run, stage)
        require(run, "score")
    run = done(run, "score", text="anew")
    with pytest.raises(ValueError, match=r"plan.json is out of date: scores.safetensors has changed since; run `curvepress plan"):
        require(run, "fit")
    without = Run(run.folder, "digits", {}, {n: e for n, e in run.stages.items() if n != "trace"})
    with pytest.raises(ValueError, match=r"was not written by this run; run `curvepress trace digits --out .*run` to make it"):
        require(without, "score")


def test_a_plan_by_hand_is_read_whatever_it_stands_on(run: Run):
    (run.folder / "plan.json").write_text("by hand")
    require(run, "apply")
    with pytest.raises(ValueError, match=r"pruned.safetensors is out of date: plan.json has changed since; run `curvepress apply"):
        require(run, "fit")
    run = done(done(run, "apply", text="anew"), "repair", text="anew")
    require(run, "fit")
    (run.folder / "plan.json").unlink()
    with pytest.raises(ValueError, match=r"plan.json is missing; run `curvepress plan"):
        require(run, "apply")


def test_checkpoints_belong_to_settings_and_inputs_and_go_when_the_stage_is_done(run: Run):
    first = scratch(run, "fit", {"lr": 0.1})
    assert scratch(run, "fit", {"lr": 0.1}) == first != scratch(run, "fit", {"lr": 0.2})
    for folder in (first, scratch(run, "fit", {"lr": 0.2})):
        folder.mkdir(parents=True)
        (folder / "state").touch()
    (run.folder / "plan.json").write_text("by hand")
    assert scratch(run, "fit", {"lr": 0.1}) != first
    assert scratch(run, "fit", {"lr": 0.2}).parent == first.parent and first.exists()
    done(run, "fit")
    assert not first.parent.exists()


def test_a_run_that_has_done_nothing_yet_may_become_another(tmp_path: Path):
    create(tmp_path / "run", "digits", {})
    assert create(tmp_path / "run", "cifar10", {"depth": "20"}).options == {"depth": "20"}
    assert open_run(tmp_path / "run").recipe == "cifar10"


def test_a_run_of_another_recipe_or_with_other_options_is_refused(run: Run):
    with pytest.raises(ValueError, match=r"holds a run of digits with no options, not of cifar10 with depth=20; choose another folder"):
        create(run.folder, "cifar10", {"depth": "20"})
    with pytest.raises(ValueError, match=r"digits with no options, not of digits with seed=1"):
        create(run.folder, "digits", {"seed": "1"})


MISSHAPEN: list[dict[str, object]] = [
    {"recipe": 3},
    {"options": []},
    {"options": {"a": 1}},
    {"stages": []},
    {"stages": {"fit": {}}},
    {"stages": {"fit": {"settings": {}, "inputs": {"a": 1}, "outputs": {}, "taken": {"cpu": 1, "wall": 1, "peak": 1}}}},
    {"stages": {"fit": {"settings": 3, "inputs": {}, "outputs": {}, "taken": {"cpu": 1, "wall": 1, "peak": 1}}}},
    {"stages": {"fit": {"settings": {}, "inputs": {}, "outputs": {}, "taken": {"cpu": "long", "wall": 1, "peak": 1}}}},
]


@pytest.mark.parametrize("change", MISSHAPEN, ids=str)
def test_a_misshapen_manifest_is_refused(run: Run, change: dict[str, object]):
    manifest = run.folder / "run.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(ValueError, match=r"run.json is damaged"):
        open_run(run.folder)


@pytest.mark.parametrize("change", [{"format": "curvepress plan"}, {"version": 2}])
def test_a_manifest_of_another_kind_is_refused(run: Run, change: dict[str, object]):
    manifest = run.folder / "run.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(ValueError, match=r"run.json is another kind of file: expected .*'curvepress run', 'version': 1"):
        open_run(run.folder)


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no run: run.json is missing; begin with `curvepress compress`"):
        open_run(tmp_path)


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "new" / "file"
    files.write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_text(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_killed_processes_left_is_swept_up_and_nothing_else(tmp_path: Path):
    stay = {".keep.1.tmp", ".plan.json.swp", "plan.json", "notes.tmp"}
    for name in (".model.safetensors.123.tmp", ".run.json.9.tmp", *stay):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == stay


def test_a_folder_in_which_the_first_write_was_killed_is_empty_and_others_are_not(tmp_path: Path):
    (tmp_path / ".run.json.9.tmp").touch()
    create(tmp_path, "digits", {})
    (tmp_path / "run.json").unlink()
    (tmp_path / ".thesis.tmp").touch()
    with pytest.raises(ValueError, match=r"holds other files \(.thesis.tmp\) and no run"):
        create(tmp_path, "digits", {})


def test_a_folder_is_free_again_once_its_owner_is_done(tmp_path: Path):
    with files.alone_in(tmp_path), pytest.raises(ValueError, match="another process is at work in"), files.alone_in(tmp_path):
        pass
    with files.alone_in(tmp_path):
        pass


def test_meters_run_while_the_body_does():
    with metered() as taken:
        held = bytearray(64 << 20)
        held[::4096] = b"x" * len(held[::4096])
        sum(range(100_000))
    assert taken.cpu > 0 and taken.wall > 0 and taken.peak > 64
