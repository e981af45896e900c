"""The command line as people use it: the main job, its stages, and what is said when something is wrong."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from curvepress import files
from curvepress import report as reports
from curvepress.commands import cli
from curvepress.curvature import setup
from curvepress.export import Agreement, Quartiles, Timing
from curvepress.plan import from_json, to_json
from curvepress.runs.folder import FLOWS
from curvepress.runs.settings import method_of
from curvepress.stages import pipeline, sessions

TINY = Path(__file__).parent / "tiny_recipe.py"
RESULTS = (
    "original.safetensors",
    "scores.safetensors",
    "plan.json",
    "pruned.safetensors",
    "repaired.safetensors",
    "model.safetensors",
    "history.json",
)
COMMANDS = tuple(FLOWS)


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def typed(*args: object) -> Said:
    """What comes of a command, typed."""
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Said(result.exit_code, result.stdout, result.stderr)


def refused(*args: object) -> str:
    """The one message of a command that must fail."""
    said = typed(*args)
    assert said.code == 1, said
    assert said.err.startswith("curvepress: ") and said.err.count("\n") == 1, said.err
    return said.err


def bytes_of(folder: Path, names: tuple[str, ...] = RESULTS) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def as_one_file(model: object, inputs: object, path: Path) -> Agreement:
    files.write_bytes(path, b"a model")
    return Agreement(0.0, 0.0, 1e-4, "dynamic", (2, 5), 7, 18, {})


def in_no_time(paths: dict[str, Path], example: object, *, threads: int, batches: tuple[int, ...]) -> tuple[Timing, ...]:
    one = Quartiles(1.0, 1.0, 1.0)
    return tuple(Timing(name, size, threads, 5, one, one, one) for size in batches for name in paths)


def undrawn(patch: pytest.MonkeyPatch) -> None:
    """Without timing and drawing."""
    patch.setattr(pipeline, "compare_latency", in_no_time)
    patch.setattr(reports, "html", lambda report: "<html></html>")


def made_in(home: Path, *asked: object) -> Path:
    """The folder of a finished run, without timing and drawing, and its recipe in the folder above."""
    shutil.copy(TINY, home / "task.py")
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        said = typed("compress", home / "task.py", *asked, "--out", home / "run")
    assert said.code == 0, said
    return home / "run"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the work of others that takes long: export, timing and drawing."""
    monkeypatch.setattr(pipeline, "to_onnx", as_one_file)
    undrawn(monkeypatch)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return Path(shutil.copy(TINY, tmp_path / "task.py"))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, by the real exporters, and its recipe in the folder above."""
    home = tmp_path_factory.mktemp("first")
    shutil.copy(TINY, home / "task.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "compare_latency", in_no_time)
        said = typed("compress", home / "task.py", "--params", "0.5", "--out", home / "run")
    assert said.code == 0, said
    assert f"report: {home / 'run' / 'report.html'}" in said.out.splitlines()
    return home / "run"


@pytest.fixture
def finished(first: Path, tmp_path: Path, quick: None) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(first, tmp_path / "run"))


def compress(folder: Path, *more: object, params: object = 0.5) -> tuple[object, ...]:
    """The command that made, or goes on with, a run whose recipe is in the folder of the first one."""
    return ("compress", *more[:1], "--params", params, "--out", folder, *more[1:])


def test_a_finished_run_holds_what_it_promises(first: Path):
    wanted = {name for flow in FLOWS.values() for name in flow.writes} | {"run.json"}
    assert {p.name for p in first.iterdir()} == wanted


def test_the_report_sets_the_original_beside_what_became_of_it(first: Path):
    task, run = cli.load_recipe(str(first.parent / "task.py")), cli.open_run(first)
    found = cli.read_report(run)
    original, small = cli.Desk(run, task).original(), cli.Desk(run, task).compressed("model.safetensors")
    assert list(found.metrics)[:2] == ["original", "pruned"]
    assert (found.metrics["original"], found.metrics["recovered"]) == (
        task.metrics(original, "validation"),
        task.metrics(small, "validation"),
    )
    assert found.test == {"original": task.metrics(original, "test"), "recovered": task.metrics(small, "test")}
    assert found.after.params == sum(p.numel() for p in small.parameters()) <= 0.5 * found.before.params


def test_prices_after_repair_are_held_against_repaired_models(first: Path):
    task, run = cli.load_recipe(str(first.parent / "task.py")), cli.open_run(first)
    desk = cli.Desk(run, task)
    assert run.stages["score"].settings["method"] == "reconstruction"
    batches = list(islice(task.batches("calibration", seed=1), pipeline.PROBED))
    with torch.no_grad():
        losses = [[float(task.loss(m(x), y)) for x, y in batches] for m in (desk.original(), desk.compressed("repaired.safetensors"))]
    rise = (sum(losses[1]) - sum(losses[0])) / len(batches)
    last = json.loads((first / "pruned.json").read_text())["frontier"][-1]
    assert last["measured"] == pytest.approx(rise, rel=1e-4) and last["predicted"] is not None


@pytest.mark.parametrize(
    ("given", "repaired", "method"), [(None, True, "reconstruction"), (None, False, "mask_curvature"), ("taylor", True, "taylor")]
)
def test_the_price_is_that_of_what_is_done_afterwards(given: str | None, repaired: bool, method: str):
    assert method_of(given, repaired=repaired) == method


def test_the_same_command_again_keeps_everything(first: Path, quick: None):
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in first.iterdir()}
    said = typed(*compress(first, first.parent / "task.py"))
    assert said.code == 0 and said.out.count("done before") == len(COMMANDS) and "\nestimate" not in said.out
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in first.iterdir()} == before


def test_stages_one_by_one_give_the_same(first: Path, recipe: Path, tmp_path: Path, quick: None):
    folder = tmp_path / "stages"
    asked = {"trace": (recipe, "--out", folder), "plan": (folder, "--params", "50%")}
    for stage in COMMANDS:
        said = typed(stage, *asked.get(stage, (folder,)))
        assert said.code == 0, said
    assert bytes_of(folder) == bytes_of(first)
    assert typed(*compress(folder, recipe)).out.count("done before") == len(COMMANDS)


def test_other_settings_are_refused_by_name_and_again_does_what_they_touch(first: Path, finished: Path):
    task = first.parent / "task.py"
    message = refused(*compress(finished, task, "--lr", "0.1", params=0.4))
    assert "stage 'plan' was done otherwise (params was 0.5, now 0.4)" in message and "add --again" in message
    assert "stage 'trace' was done otherwise (threads was 1, now 2)" in refused(*compress(finished, task, "--threads", "2"))
    assert "lr was 0.05, now 0.1" in refused(*compress(finished, task, "--lr", "0.1"))
    assert bytes_of(finished) == bytes_of(first)
    said = typed(*compress(finished, task, "--again", params=0.4))
    assert said.code == 0 and said.out.count("done before") == 2  # trace and score
    fresh = finished.with_name("fresh")
    assert typed(*compress(fresh, task, params=0.4)).code == 0
    assert bytes_of(finished) == bytes_of(fresh)
    assert bytes_of(finished)["plan.json"] != bytes_of(first)["plan.json"]


def test_an_edited_plan_is_carried_out_and_never_overwritten_unasked(first: Path, finished: Path):
    plan = from_json((finished / "plan.json").read_text())
    edited = type(plan)(plan.structure, {**plan.keep, "0": (0, 1, 2)})
    (finished / "plan.json").write_text(to_json(edited))
    assert "pruned.safetensors is out of date: plan.json has changed since; run `curvepress apply" in refused("fit", finished)
    for stage in ("apply", "repair", "fit", "export", "report"):
        assert typed(stage, finished).code == 0
    restored = cli.Desk(cli.open_run(finished), cli.load_recipe(str(first.parent / "task.py"))).compressed("model.safetensors")
    assert restored[0].weight.shape == (3, 6)
    message = refused(*compress(finished, first.parent / "task.py"))
    assert "plan.json is not as the stage wrote it" in message and "curvepress apply" in message
    assert from_json((finished / "plan.json").read_text()).keep["0"] == (0, 1, 2)
    assert typed(*compress(finished, first.parent / "task.py", "--again")).code == 0
    assert bytes_of(finished) == bytes_of(first)


def test_a_plan_from_elsewhere_needs_no_plan_of_its_own(first: Path, recipe: Path, tmp_path: Path, quick: None):
    assert typed("trace", recipe, "--out", tmp_path / "run").code == 0
    assert typed("score", tmp_path / "run").code == 0
    shutil.copy(first / "plan.json", tmp_path / "run")
    assert typed("apply", tmp_path / "run").code == 0
    assert bytes_of(tmp_path / "run", RESULTS[:4]) == bytes_of(first, RESULTS[:4])


class Killed(BaseException):
    """The end of the process, as far as it is concerned."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_killed_at_any_write_goes_on_to_the_same_result(
    first: Path, recipe: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, after: bool
):
    """Attempt n ends at its n-th write, before or after the file got its name."""
    replace, left = os.replace, [0]

    def deadly(source: Path, target: Path) -> None:
        left[0] -= 1
        if not left[0] and not after:
            shutil.copy(source, source.with_name(source.name.replace(f".{os.getpid()}.", ".1.")))  # as a kill would leave it
        else:
            replace(source, target)
        if not left[0]:
            raise Killed

    monkeypatch.setattr(files.os, "replace", deadly)
    attempts = 0
    while True:
        attempts += 1
        left[0] = attempts
        try:
            assert typed(*compress(tmp_path / "run", recipe)).code == 0
            break
        except Killed:
            assert attempts < 30
    assert attempts > 4
    assert bytes_of(tmp_path / "run") == bytes_of(first)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in first.iterdir()}


def test_a_process_killed_in_the_fine_tune_goes_on_to_the_same_result(first: Path, recipe: Path, tmp_path: Path, quick: None):
    """Epoch 2 begins, and the process is gone (the file ``deadly`` says so); the data of epoch 1 is not read again."""
    lines = "(x[rows], y[rows]) for rows in order.split(16)]"
    text = recipe.read_text().replace(f"    return [{lines}", f"    watch(split)\n    return [{lines}")
    watch = (
        "\n\ndef watch(split):\n    import os, pathlib\n    here = pathlib.Path(__file__).parent\n"
        "    with (here / 'log').open('a') as log:\n        log.write(split + ' ')\n"
        "    if split == 'train' and (here / 'log').read_text().count('train') == 4 and (here / 'deadly').exists():\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    recipe.write_text(text + watch)
    (tmp_path / "deadly").touch()
    command = [str(a) for a in compress(tmp_path / "run", recipe)]
    program = "import sys; from curvepress.commands.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended
    assert not (tmp_path / "run" / "model.safetensors").exists()
    (tmp_path / "deadly").unlink()
    (tmp_path / "log").unlink()
    assert typed(*command).code == 0
    assert (tmp_path / "log").read_text().count("train") == 2  # for the estimate, and for the second epoch
    assert bytes_of(tmp_path / "run") == bytes_of(first)


def test_scores_killed_half_way_go_on_from_their_samples(
    first: Path, recipe: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
):
    computed = []
    sample = setup.Setup.sample

    def deadly(*args: Any, **kwargs: Any) -> Any:
        computed.append(1)
        if len(computed) == 3:
            raise Killed
        return sample(*args, **kwargs)

    monkeypatch.setattr(setup.Setup, "sample", deadly)
    with pytest.raises(Killed):
        typed(*compress(tmp_path / "run", recipe))
    assert typed(*compress(tmp_path / "run", recipe)).code == 0
    assert len(computed) == 3 + 2  # of four samples
    assert bytes_of(tmp_path / "run") == bytes_of(first)


@pytest.mark.parametrize("nth", [1, 2, 4, 6, 9, 11, 14, 17])
def test_a_full_disk_is_said_with_the_file_and_the_run_goes_on(
    first: Path, recipe: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, nth: int
):
    calls = [0]

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    message = refused(*compress(tmp_path / "run", recipe))
    assert str(tmp_path / "run") in message and ": No space left on device; nothing half-written is left" in message
    assert not list(tmp_path.rglob("*.tmp"))
    assert typed(*compress(tmp_path / "run", recipe)).code == 0
    assert bytes_of(tmp_path / "run") == bytes_of(first)


def test_a_folder_that_cannot_be_written_is_said(recipe: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "file is a file; give a folder" in refused(*compress(tmp_path / "file", recipe))
    assert "Not a directory" in refused(*compress(tmp_path / "file" / "run", recipe))
    assert "holds other files (thesis.tex) and no run" in refused(*compress(tmp_path / "full", recipe))
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_an_interruption_is_said(recipe: Path, tmp_path: Path):
    recipe.write_text(recipe.read_text().replace("    x, y = data(split)\n    order", "    raise KeyboardInterrupt\n    order"))
    said = typed(*compress(tmp_path / "run", recipe))
    assert (said.code, said.err) == (130, "curvepress: interrupted; the same command goes on from here\n")


def exploit(mark: Path) -> bytes:
    """A pickle that makes a folder when it is read."""
    return f"cos\nmkdir\n(V{mark}\ntR.".encode()


SPOILERS: dict[str, Callable[[Path], bytes]] = {
    "truncated": lambda path: path.read_bytes()[: path.stat().st_size // 2],
    "empty": lambda path: b"",
    "flipped": lambda path: path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]),
    "a pickle": lambda path: exploit(path.with_name("executed")),
    "a list": lambda path: b"[1, 2]",
    "deep": lambda path: b"[" * 100_000,
}
READER = {name: stage for stage in reversed(COMMANDS) for name in FLOWS[stage].reads}


@pytest.mark.parametrize("spoiler", SPOILERS)
@pytest.mark.parametrize("name", READER)
def test_a_spoilt_file_is_refused_by_name_with_the_way_out(first: Path, finished: Path, name: str, spoiler: str):
    spoilt = finished / name
    spoilt.write_bytes(SPOILERS[spoiler](spoilt))
    budget = ("--params", "0.5") if READER[name] == "plan" else ()
    message = refused(READER[name], finished, *budget)
    assert str(spoilt) in message and "curvepress " in message.removeprefix("curvepress: ")
    assert name in refused(*compress(finished, first.parent / "task.py"))
    assert not (finished / "executed").exists()


@pytest.mark.parametrize("name", READER)
def test_again_makes_a_spoilt_file_anew(first: Path, finished: Path, name: str):
    (finished / name).write_bytes(b"spoilt")
    assert typed(*compress(finished, first.parent / "task.py", "--again")).code == 0
    assert bytes_of(finished) == bytes_of(first)


@pytest.mark.parametrize("spoiler", [s for s in SPOILERS if s != "flipped"])
def test_a_spoilt_manifest_is_refused(first: Path, finished: Path, spoiler: str):
    (finished / "run.json").write_bytes(SPOILERS[spoiler](finished / "run.json"))
    for command in (("report", finished), compress(finished, first.parent / "task.py")):
        assert f"{finished / 'run.json'} is" in refused(*command)
    assert not (finished / "executed").exists()


def test_a_plan_of_another_model_is_refused(finished: Path, recipe: Path, tmp_path: Path):
    other = tmp_path / "other"
    assert typed("trace", recipe, "--out", other, "--option", "width=8").code == 0
    assert typed("score", other).code == 0
    assert typed("plan", other, "--params", "0.5").code == 0
    shutil.copy(other / "plan.json", finished)
    message = refused("apply", finished)
    assert "plan.json is for another model: 0.weight is (8, 6) in the plan and (12, 6) here; make one for this model" in message


def test_a_plan_that_makes_no_sense_is_refused(finished: Path):
    text = (finished / "plan.json").read_text()
    (finished / "plan.json").write_text(text.replace('"keep": {', '"keep": {"absent": [1], '))
    assert "plan.json: keep['absent']: no such group; the groups are" in refused("apply", finished)
    (finished / "plan.json").write_text(text.replace('"keep": {', '"keep": {"4": [1], '))
    assert "keep['4']: this group cannot be cut: model output" in refused("apply", finished)


def test_a_missing_file_is_made_again_and_asked_for_by_the_next_stage(first: Path, finished: Path):
    (finished / "pruned.safetensors").unlink()
    message = refused("fit", finished)
    assert f"pruned.safetensors is missing; run `curvepress apply {finished}` to make it" in message
    said = typed(*compress(finished, first.parent / "task.py"))
    assert said.code == 0 and said.out.count("done before") == len(COMMANDS) - 1
    assert bytes_of(finished) == bytes_of(first)


def test_a_run_of_another_recipe_is_refused(first: Path, finished: Path, recipe: Path):
    message = refused(*compress(finished, recipe))
    assert f"holds a run of {first.parent / 'task.py'} with no options, not of {recipe} with no options" in message
    assert "not of" in refused(*compress(finished, first.parent / "task.py", "--option", "width=8"))
    assert bytes_of(finished) == bytes_of(first)


def test_a_recipe_that_changed_is_refused_and_one_that_moved_is_not(recipe: Path, tmp_path: Path, quick: None):
    assert typed(*compress(tmp_path / "run", recipe)).code == 0
    moved = recipe.rename(tmp_path / "moved.py")
    assert f"there is no recipe at {recipe}" in refused("report", tmp_path / "run")
    assert typed(*compress(tmp_path / "run", moved)).out.count("done before") == len(COMMANDS)
    moved.write_text(moved.read_text() + "# more\n")
    message = refused(*compress(tmp_path / "run", moved))
    assert "stage 'trace' was done otherwise (the recipe's code has changed)" in message


def test_again_after_a_change_of_the_recipe_does_all_that_ran_its_code(recipe: Path, tmp_path: Path, quick: None):
    assert typed(*compress(tmp_path / "run", recipe)).code == 0
    recipe.write_text(recipe.read_text().replace("return F.cross_entropy(output, targets)", "return 2 * F.cross_entropy(output, targets)"))
    assert typed(*compress(tmp_path / "run", recipe, "--again")).code == 0
    assert typed(*compress(tmp_path / "fresh", recipe)).code == 0
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "fresh")


def test_a_stage_that_is_asked_for_by_name_is_done_again(first: Path, finished: Path):
    said = typed("fit", finished, "--epochs", "3")
    assert said.code == 0 and "done before" not in said.out
    assert bytes_of(finished, ("history.json",)) != bytes_of(first, ("history.json",))
    assert "done before" not in typed("fit", finished).out
    assert bytes_of(finished) == bytes_of(first)


def test_a_model_that_fails_in_the_middle_of_a_stage_is_said(recipe: Path, tmp_path: Path, quick: None):
    trap = "    network.register_forward_pre_hook(lambda m, x: {}['lost'] if m.training else None)\n    return network"
    recipe.write_text(recipe.read_text().replace("    return network", trap))
    message = refused(*compress(tmp_path / "run", recipe))
    assert f"{recipe}: the stage 'fit' failed: KeyError: 'lost' (line " in message


def test_a_model_that_cannot_be_built_untrained_is_refused(recipe: Path, tmp_path: Path):
    text = recipe.read_text().replace("    network = ", "    width = width if trained else 5\n    network = ")
    recipe.write_text(text)
    message = refused(*compress(tmp_path / "run", recipe))
    assert "model(trained=False) makes another model than model(): 0.weight is (12, 6) torch.float32 there and (5, 6)" in message
    assert not (tmp_path / "run" / "original.safetensors").exists()


def test_a_model_in_which_nothing_can_be_cut_is_refused(recipe: Path, tmp_path: Path):
    recipe.write_text(recipe.read_text().replace("    return network", "    return nn.Linear(6, 3)"))
    assert "nothing in this model can be cut: model output; reads" in refused(*compress(tmp_path / "run", recipe))


def test_the_report_tells_the_threads_the_work_ran_on(finished: Path):
    assert typed("fit", finished, "--threads", "2").code == 0
    assert typed("export", finished).code == 0
    assert typed("report", finished).code == 0
    assert cli.read_report(cli.open_run(finished)).environment["threads"] == "1, 2"


def test_a_run_without_training_is_a_run(recipe: Path, tmp_path: Path, quick: None):
    assert typed(*compress(tmp_path / "run", recipe, "--epochs", "0", "--threads", "2")).code == 0
    assert cli.read_report(cli.open_run(tmp_path / "run")).environment["threads"] == "2"
    small, pruned = ((tmp_path / "run" / name).read_bytes() for name in ("model.safetensors", "repaired.safetensors"))
    assert small == pruned


def test_code_that_came_with_a_run_is_not_run(finished: Path):
    (finished / "task.py").write_text(f"import os; os.mkdir({str(finished / 'executed')!r})")
    text = (finished / "run.json").read_text()
    start = text.index('"recipe": ') + len('"recipe": ')
    for name in (str(finished / "task.py"), "task.py"):
        (finished / "run.json").write_text(f'{text[:start]}"{name}"{text[text.index(",", start) :]}')
        assert "code that came with a run is not run" in refused("report", finished)
    assert not (finished / "executed").exists()


def test_two_processes_do_not_work_in_one_folder(first: Path, finished: Path):
    with files.alone_in(finished):
        assert f"another process is at work in {finished}" in refused("report", finished)
        assert "another process is at work" in refused(*compress(finished, first.parent / "task.py"))
    assert typed("report", finished).code == 0


def test_an_impossible_budget_is_refused_before_the_work_with_the_smallest_that_can_be(recipe: Path, tmp_path: Path):
    message = refused(*compress(tmp_path / "run", recipe, params=0.01))
    assert "no plan fits the budget (params at most 0.01 of the original); the smallest this model can be made is: params 15 " in message
    assert "write 5%" in refused(*compress(tmp_path / "run", recipe, params=5))
    message = refused(*compress(tmp_path / "run", recipe, params=100000))
    assert "the whole model (279 params, 1,116 bytes, 252 macs, 258,048 bops) already fits" in message
    assert not (tmp_path / "run" / "scores.json").exists()
    assert typed("score", tmp_path / "run").code == 0
    assert "the smallest this model can be made" in refused("plan", tmp_path / "run", "--params", "0.01")
    assert typed("plan", tmp_path / "run", "--params", "200").code == 0


def test_brackets_in_paths_are_shown_as_they_are(recipe: Path, tmp_path: Path, quick: None):
    folder = tmp_path / "a [bold]very[/bold] long name of a folder, longer than the lines of most terminals [red]" / "b"
    said = typed(*compress(folder, recipe))
    assert said.code == 0 and said.out.splitlines()[-1] == f"report: {folder / 'report.html'}"
    assert str(folder) in refused(*compress(folder, recipe, params=0.4))


def test_settings_that_cannot_be_are_refused_before_the_work(recipe: Path, tmp_path: Path):
    out = tmp_path / "run"
    for more, message in (
        (("--lr", "-1"), "lr must be a positive number; got -1.0"),
        (("--weight-decay", "nan"), "weight_decay must be 0 or more; got nan"),
        (("--milestones", "3"), "milestones must be rising epochs, given for the step schedule"),
        (("--option", "width"), "--option must be name=value, such as depth=56; got 'width'"),
        (("--option", "depth=3"), "has no option 'depth'; its options are width"),
        (("--option", "width=8", "--option", "width=9"), "an option of the recipe is given twice"),
    ):
        assert message in refused(*compress(out, recipe, *more))
    for more, message in (
        (("--method", "guess"), "mask_curvature"),
        (("--epochs", "-1"), "--epochs"),
        (("--optimizer", "lion"), "adamw"),
        (("--floor", "2"), "--floor"),
        (("--samples", "1"), "--samples"),
    ):
        said = typed(*compress(out, recipe, *more))
        assert said.code == 2 and message in said.err
    assert not out.exists()


def test_recovery_of_the_recipe_is_checked_before_the_work(recipe: Path, tmp_path: Path):
    text = recipe.read_text()
    for recovery, message in (
        ('{"epoch": 3}', "RECOVERY has unknown settings 'epoch'; allowed are epochs, lr"),
        ('{"epochs": 2.5}', "RECOVERY['epochs'] must be like 1; got 2.5"),
        ('{"epochs": -1}', "epochs must be 0 or more; got -1"),
        ('{"optimizer": "lion"}', "optimizer must be one of sgd, adamw; got 'lion'"),
    ):
        recipe.write_text(text.replace('{"epochs": 2, "lr": 0.05}', recovery))
        message_seen = refused(*compress(tmp_path / "run", recipe))
        assert message in message_seen and str(recipe) in message_seen
    assert not (tmp_path / "run").exists()


def test_the_schedule_of_the_user_goes_without_the_milestones_of_the_recipe(recipe: Path):
    recipe.write_text(recipe.read_text().replace('"lr": 0.05', '"lr": 0.05, "schedule": "step", "milestones": [1]'))
    task = cli.load_recipe(str(recipe))
    assert cli.tuning(task, {})["milestones"] == [1]
    assert cli.tuning(task, {"schedule": "cosine"})["milestones"] == []
    assert cli.tuning(task, {"milestones": [1, 2], "lr": None})["milestones"] == [1, 2]


@pytest.mark.parametrize(
    ("text", "limit"),
    [("0.5", 0.5), ("50%", 0.5), (" 12.5 % ", 0.125), ("1.0", 1.0), ("100000", 100000), ("1e5", 100000), ("50", 50), ("100%", 1.0)],
)
def test_limits_are_shares_or_numbers(text: str, limit: float):
    found = cli.limits(text, None, "0.3")
    assert found == {"params": limit, "bytes": None, "macs": 0.3}
    assert type(found["params"]) is type(limit)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "150%", "nan", "inf", "-inf", "half", "", "0%", "%"])
def test_limits_that_are_neither_are_refused(text: str):
    with pytest.raises(ValueError, match=r"--macs must be a share above 0 and up to 1 .*, or a whole number above 1; got"):
        cli.limits("0.5", None, text)


def test_limits_that_limit_nothing_are_refused():
    with pytest.raises(ValueError, match=r"no budget is given; say how small, such as --params 0.5"):
        cli.limits(None, None, None)
    with pytest.raises(ValueError, match=r"--params 1 --macs 100% is the whole model; ask for a share below 1"):
        cli.limits("1", None, "100%")


def test_a_data_folder_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    assert sessions.pairs_of(["depth=56"], "images") == {"depth": "56", "data": str(tmp_path / "images")}
    assert sessions.pairs_of(["data=s3://images"], None) == {"data": "s3://images"}


def test_files_that_take_one_batch_size_are_timed_at_it():
    some, one = (Agreement(0.0, 0.0, 1e-4, batch, sizes, 7, 18, {}) for batch, sizes in (("dynamic", (2, 5)), ("static", (4,))))
    assert pipeline._batch_sizes({"a": some, "b": some}, [1, 64]) == (1, 64)
    assert pipeline._batch_sizes({"a": some, "b": one}, [1, 64]) == (4,)


def test_a_terminal_that_knows_few_characters_is_no_reason_to_fail(finished: Path, monkeypatch: pytest.MonkeyPatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["curvepress", "report", str(finished)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    stream.flush()
    assert b"report: " in stream.buffer.getvalue() and b"?" in stream.buffer.getvalue()


@pytest.mark.parametrize("command", ["compress", *COMMANDS])
def test_every_command_explains_itself(command: str):
    said = typed(command, "--help")
    assert said.code == 0 and "Usage:" in said.out and "--" in said.out


def test_the_version_is_told():
    said = typed("--version")
    assert said.code == 0 and said.out == f"curvepress {cli.version('curvepress')}\n"
