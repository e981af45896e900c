"""Runtimes behind one interface: what seconds single layers take there, and how a whole model is run there."""

from __future__ import annotations

import json
import platform
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..export import to_onnx
from ..export.latency import quickest
from ..export.onnx import open_session, session_options
from ..export.openvino import compiled_in_openvino
from ..latency import FLOAT, Machine
from .graphs import Case, graph_of

Run = Callable[[], Any]
SECONDS = 0.15
"""How long a set of layers is timed, if they are not too slow for it."""
FEWEST, MOST = 8, 60
OWN = re.compile(r"(?:fused )?b(\d+)_(?!relu).*_kernel_time")
"""A kernel of a case in a profile: not a change of layout, a quantization of what goes in and out, or a nonlinearity on its own."""
OPENINGS = 12
RACE = 1.0
"""Seconds that whole models are timed for, each."""


@dataclass(frozen=True)
class Runtime:
    """A runtime by its name.

    ``package`` is what must be installed.  ``layers(cases, threads, batch)`` returns the seconds of each case.
    ``prepare(model, example, folder)`` makes of a model what ``race(prepared, example, threads)`` times in turns, in seconds for the
    whole example.  Where it takes seconds to make a layer ready to run, it is ``dear``.
    """

    name: str
    package: str
    layers: Callable[[Sequence[Case], int, int], list[float]]
    prepare: Callable[[nn.Module, tuple[Tensor, ...], Path], Any]
    race: Callable[[Sequence[Any], tuple[Tensor, ...], int], list[float]]
    dear: bool = False


def machine(runtime: str, threads: int = 1, batch: int = 1) -> Machine:
    """This machine with a runtime and its settings.

    Raises:
        ValueError: if the runtime is unknown or not installed, or a number is not positive.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"the runtime must be one of {', '.join(RUNTIMES)}; got {runtime!r}")
    if threads < 1 or batch < 1:
        raise ValueError(f"a latency is measured with one or more threads and examples a batch; got {threads} and {batch}")
    package = RUNTIMES[runtime].package
    try:
        return Machine(processor(), runtime, version(package), threads, batch)
    except PackageNotFoundError:
        raise ValueError(f"the runtime {runtime} is not installed: pip install {package}, or choose another with --runtime") from None


def processor() -> str:
    """The processor's model."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    said = [names.get("model name", ""), *(f"{k} {names[k]}" for k in ("cpu family", "model", "stepping") if k in names)]
    return ", ".join(x for x in said if x) or platform.processor() or platform.machine()


def _profiled(cases: Sequence[Case], threads: int, batch: int) -> list[float]:
    """Seconds of the kernels in ONNX Runtime, by its own profile: free of the copies into and out of its layouts."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads)
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = open_session(graph_of(cases, batch).SerializeToString(), options=options)
        feeds = {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()}
        start = time.perf_counter()
        session.run(None, feeds)
        once = time.perf_counter() - start
        for _ in range(runs_in(once)):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    return kernel_seconds(events, len(cases))


def runs_in(once: float) -> int:
    """How many runs of so many seconds are taken."""
    return int(np.clip(SECONDS / max(once, 1e-6), FEWEST, MOST))


def kernel_seconds(events: Sequence[Mapping[str, Any]], cases: int) -> list[float]:
    """Seconds of each case in a profile: of each of its kernels the mean of the quickest quarter, which nobody disturbed.

    Raises:
        ValueError: if a case left no kernel in it.
    """
    taken: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        name = str(event.get("name", ""))
        own = OWN.match(name)
        if event.get("cat") == "Node" and own:
            taken[int(own[1])][name].append(event["dur"] * 1e-6)
    if missing := [n for n in range(cases) if n not in taken]:
        raise ValueError(f"the runtime's profile names no kernel of layer {missing[0]}; this version of ONNX Runtime cannot be read so")
    return [max(sum(quickest(times) for times in taken[n].values()), 1e-7) for n in range(cases)]


def in_turns(runs: Sequence[Run], seconds: float = SECONDS) -> list[float]:
    """Seconds of each run: all take turns, and of each the mean of the quickest quarter counts."""
    for run in runs:
        run()
    once = sum(_seconds(run) for run in runs)
    rounds = int(np.clip(seconds / max(once, 1e-6), FEWEST, MOST))
    readings = [[_seconds(run) for run in runs] for _ in range(rounds)]
    return [quickest(column) for column in zip(*readings, strict=True)]


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _beyond_nothing(runs: Sequence[Run], nothing: Run) -> list[float]:
    """Seconds of each run beyond those of a call that does next to nothing."""
    *found, least = in_turns([*runs, nothing])
    return [max(t - least, 1e-7) for t in found]


def _in_openvino(cases: Sequence[Case], threads: int, batch: int) -> list[float]:
    runs = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer.onnx"
            path.write_bytes(graph_of([case], batch).SerializeToString())
            runs.append(_calls(compiled_in_openvino(path, threads)[0], np.ones(case.input(batch), np.float32)))
    return in_turns(runs)


def _calls(function: Callable[..., Any], *given: Any) -> Run:
    return lambda: function(*given)


def _in_torch(compiled: bool) -> Callable[[Sequence[Case], int, int], list[float]]:
    def layers(cases: Sequence[Case], threads: int, batch: int) -> list[float]:
        with _threads(threads), torch.inference_mode():
            runs = [_calls(_torch(_module(c), compiled), torch.ones(c.input(batch))) for c in cases]
            return _beyond_nothing(runs, _calls(nn.Identity(), torch.ones(1)))

    return layers


def _module(case: Case) -> nn.Module:
    if case.bits != FLOAT:
        raise ValueError(f"a layer of {case.bits} bits is timed in onnxruntime and openvino only; choose one of them")
    layer = case.layer
    if layer.kind == "linear":
        return nn.Linear(case.into, case.out)
    made = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(layer.kernel)]
    assert made is not None
    groups = case.out if layer.depthwise else 1
    channels = (case.out if layer.depthwise else case.into, case.out)
    return made(*channels, layer.kernel, layer.stride, layer.padding, layer.dilation, groups)  # type: ignore[arg-type]


def _torch(module: nn.Module, compiled: bool) -> Callable[..., Any]:
    return torch.compile(module.eval()) if compiled else module.eval()


class _threads:
    """Torch on so many threads for a while."""

    def __init__(self, threads: int) -> None:
        self.wanted, self.before = threads, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.wanted)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def _race_torch(compiled: bool) -> Callable[[Sequence[Any], tuple[Tensor, ...], int], list[float]]:
    def race(models: Sequence[Any], example: tuple[Tensor, ...], threads: int) -> list[float]:
        with _threads(threads), torch.inference_mode():
            return in_turns([_calls(_torch(m, compiled), *example) for m in models], RACE)

    return race


def _race_onnxruntime(paths: Sequence[Any], example: tuple[Tensor, ...], threads: int) -> list[float]:
    """Every file is opened anew for each turn, since one opened once keeps the memory that it happened to get."""
    arrays = [x.numpy() for x in example]
    taken: list[list[float]] = [[] for _ in paths]
    for _ in range(OPENINGS):
        for n, path in enumerate(paths):
            session = open_session(path, threads)
            feeds = {i.name: x for i, x in zip(session.get_inputs(), arrays, strict=True)}
            taken[n] += _readings(partial(session.run, None, feeds), RACE / OPENINGS)
    return [quickest(times) for times in taken]


def _readings(run: Run, seconds: float) -> list[float]:
    once = min(_seconds(run) for _ in range(3))
    return [_seconds(run) for _ in range(int(np.clip(seconds / once, FEWEST, MOST)))]


def _race_openvino(paths: Sequence[Any], example: tuple[Tensor, ...], threads: int) -> list[float]:
    given = [x.numpy() for x in example]
    return in_turns([_calls(compiled_in_openvino(path, threads)[0], given) for path in paths], RACE)


def _exported(model: nn.Module, example: tuple[Tensor, ...], folder: Path) -> Path:
    path = folder / f"{len(list(folder.glob('*.onnx')))}.onnx"
    to_onnx(model, example, path)
    return path


def _as_it_is(model: nn.Module, example: tuple[Tensor, ...], folder: Path) -> nn.Module:
    return model


RUNTIMES: Mapping[str, Runtime] = {
    r.name: r
    for r in (
        Runtime("onnxruntime", "onnxruntime", _profiled, _exported, _race_onnxruntime),
        Runtime("openvino", "openvino", _in_openvino, _exported, _race_openvino),
        Runtime("torch", "torch", _in_torch(compiled=False), _as_it_is, _race_torch(compiled=False)),
        Runtime("torch.compile", "torch", _in_torch(compiled=True), _as_it_is, _race_torch(compiled=True), dear=True),
    )
}
"""The runtimes by name."""
