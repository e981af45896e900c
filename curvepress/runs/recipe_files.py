"""Recipes as files: found, run, fingerprinted, their functions bound to options, and their faults laid at their door."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

SHIPPED = "curvepress_recipes"
CALLS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "model": ((), ()),
    "example": ((), ()),
    "loss": (("output", "targets"), ()),
    "batches": (("split",), ("seed",)),
    "evaluate": (("model", "split"), ()),
}
"""The functions of a recipe and what they are called with: by position, by name."""
OURS = ("trained", "seed")
"""Parameters that are no options: curvepress sets them."""


class RecipeError(ValueError):
    """A fault in the code of a recipe."""


@dataclass(frozen=True)
class Blame:
    """Turns what a recipe's code raises into one sentence that says where."""

    name: str
    folder: Path
    shipped: bool

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Whatever the body raises comes out as a :class:`RecipeError` that names ``what``, if it is given."""
        try:
            yield
        except RecipeError:
            raise
        except (Exception, SystemExit) as error:
            if self.shipped and isinstance(error, ValueError):  # shipped recipes explain themselves
                raise RecipeError(f"{self.name}: {error}") from error
            raise RecipeError(f"{self.name}: {what} failed: {self.said(error)}" if what else self.said(error)) from error

    def said(self, error: BaseException) -> str:
        """The error's type and message, and the last line of the recipe's own folder that it went through."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if Path(f.filename).is_relative_to(self.folder) and "site-packages" not in Path(f.filename).parts]
        place = f" (line {own[-1].lineno} of {Path(own[-1].filename).name})" if own else ""
        text = " ".join(str(error).split())
        return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


@dataclass(frozen=True)
class Found:
    """A recipe's module, under its full name, with a fingerprint of its code."""

    name: str
    module: ModuleType
    digest: str
    blame: Blame


def shipped() -> list[str]:
    """The recipes that come with curvepress."""
    return list(importlib.import_module(SHIPPED).__all__)


def read_module(name: str) -> Found:
    """The module of a recipe, run.

    Raises:
        ValueError: if there is no such recipe, or it does not run.
    """
    if not name.endswith(".py"):
        if name not in shipped():
            raise ValueError(
                f"recipe {name!r} is unknown; give the path of a Python file (ending in .py), or one of {', '.join(shipped())}"
            )
        folder = Path(str(importlib.import_module(SHIPPED).__file__)).parent
        blame = Blame(name, folder, shipped=True)
        with blame.on("the recipe"):
            module = importlib.import_module(f"{SHIPPED}.{name}")
        return Found(name, module, _fingerprint(sorted(folder.glob("*.py"))), blame)
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"there is no recipe at {path}; give the path of a Python file, or one of {', '.join(shipped())}")
    blame = Blame(str(path), path.parent, shipped=False)
    with blame.on("the file"):
        return Found(str(path), _executed(path), _fingerprint(_sources(path)), blame)


def bound_functions(found: Found, options: Mapping[str, str]) -> dict[str, Callable[..., Any]]:
    """The functions of a recipe, with those options that each takes.

    Raises:
        ValueError: if a function is missing or takes other arguments, or no function takes an option.
    """
    functions = {f: getattr(found.module, f, None) for f in CALLS}
    if missing := [f"{f}()" for f, function in functions.items() if not callable(function)]:
        raise ValueError(f"{found.name} lacks {', '.join(missing)}; a recipe has {', '.join(f'{f}()' for f in CALLS)}")
    parameters = {f: _parameters(found.name, f, function) for f, function in functions.items()}
    known = {p for taken in parameters.values() for p in taken} - set(OURS)
    for option in options:
        if option not in known:
            allowed = f"its options are {', '.join(sorted(known))}" if known else "it has none"
            raise ValueError(f"{found.name} has no option {option!r}; {allowed}")
    values = {k: _value(v) for k, v in options.items()}
    return {
        f: _bound(found.blame, f, function, {k: v for k, v in values.items() if k in parameters[f]}) for f, function in functions.items()
    }


def _parameters(recipe: str, name: str, function: Any) -> list[str]:
    """The parameters of a function that have defaults, once it is known to take what it will be called with."""
    by_position, by_name = CALLS[name]
    try:
        signature = inspect.signature(function)
        signature.bind(*by_position, **dict.fromkeys(by_name))
    except (TypeError, ValueError) as error:
        wanted = ", ".join([*by_position, *(f"{n}=0" for n in by_name)])
        raise ValueError(f"{recipe}: {name} must take ({wanted}), and further parameters only with defaults: {error}") from None
    return [p for p, q in signature.parameters.items() if q.default is not q.empty]


def _bound(blame: Blame, name: str, function: Any, values: Mapping[str, Any]) -> Callable[..., Any]:
    bound = partial(function, **values)

    what = "" if name == "loss" else f"{name}()"  # who calls the loss says what it failed on

    @wraps(bound)
    def call(*args: Any, **kwargs: Any) -> Any:
        with blame.on(what):
            return bound(*args, **kwargs)

    return call


def _value(text: str) -> Any:
    """An option as Python writes it (56, 0.1, True), or else as text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs the file as it is now: compiled code is neither kept nor looked for, as it may be that of a second ago."""

    def path_stats(self, path: Any) -> Any:
        raise OSError(f"no compiled code of {path}")


def _executed(path: Path) -> ModuleType:
    """The module of a file, which may import those beside it, as a program does."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = f"recipe_{path.stem}"
    spec = importlib.util.spec_from_loader(name, _Loader(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and workers look for it
    spec.loader.exec_module(module)
    return module


def _sources(path: Path) -> list[Path]:
    """The file and those beside it that it imports, directly or not."""
    found: list[Path] = []
    todo = [path]
    while todo:
        if (file := todo.pop()) not in found:
            found.append(file)
            todo += [f for name in _imports(file) for f in _beside(path.parent, name)]
    return sorted(found)


def _imports(file: Path) -> set[str]:
    """The first names of all that a file imports."""
    nodes = list(ast.walk(ast.parse(file.read_bytes())))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
    return {name.split(".")[0] for name in names}


def _beside(folder: Path, name: str) -> list[Path]:
    package = folder / name
    return [*folder.glob(f"{name}.py"), *(package.rglob("*.py") if (package / "__init__.py").is_file() else ())]


def _fingerprint(files: list[Path]) -> str:
    content = hashlib.sha256()
    for file in files:
        content.update(hashlib.sha256(file.read_bytes()).digest())
    return content.hexdigest()[:16]
