"""Print the sizes of functions and files and who imports whom; fail where a size is over its limit.

python scripts/house.py
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("curvepress", "curvepress_recipes", "benchmarks", "scripts")
FUNCTION_LINES = 60
FILE_LINES = 400

Sizes = list[tuple[int, str]]
"""``(lines, where)``."""


def sources(root: Path = ROOT, folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    """The Python files in ``folders``, those that exist, in the order of their names."""
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def function_sizes(path: Path, root: Path = ROOT) -> Sizes:
    """Lines from first to last statement of every function in a file, docstrings left out."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            found.append((lines, f"{path.relative_to(root)}:{node.lineno} {node.name}"))
    return found


def file_sizes(paths: list[Path], root: Path = ROOT) -> Sizes:
    """Lines of every file."""
    return [(len(path.read_text(encoding="utf-8").splitlines()), str(path.relative_to(root))) for path in paths]


def over(sizes: Sizes, limit: int) -> list[str]:
    """A sentence for each size above ``limit``, the longest first."""
    return [f"{where}: {lines} lines, allowed are {limit}" for lines, where in sorted(sizes, reverse=True) if lines > limit]


def module_name(path: Path, root: Path = ROOT) -> str:
    """The dotted name under which ``path`` is imported from ``root``."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """``(local name, dotted name)`` of all that a file of ``package`` imports, anywhere in it, relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.asname or a.name, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            stem = [*above, node.module] if node.module else above
            yield from ((a.asname or a.name, ".".join([*stem, a.name])) for a in node.names)


def import_graph(paths: list[Path], root: Path = ROOT) -> dict[str, set[str]]:
    """For every module among ``paths``: the modules among them that it imports."""
    modules = {module_name(path, root): path for path in paths}
    return {name: _among(modules, path, root) for name, path in modules.items()}


def _among(modules: dict[str, Path], path: Path, root: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [name.split(".") for _, name in imported(tree, path.relative_to(root).parent.parts)]
    prefixes = ([".".join(parts[:n]) for n in range(len(parts), 0, -1)] for parts in names)
    return {next((p for p in candidates if p in modules), "") for candidates in prefixes} - {""}


def main() -> int:
    """Print the report; the exit status is 1 where a limit is passed."""
    paths = sources()
    functions = [size for path in paths for size in function_sizes(path)]
    files = file_sizes(paths)
    print("Who imports whom")
    for module, targets in sorted(import_graph(paths).items()):
        print(f"  {module}: {', '.join(sorted(targets)) or '-'}")
    for what, sizes in (("files", files), ("functions", functions)):
        lines = [n for n, _ in sizes]
        tenth = quantiles(lines, n=10)[-1] if len(lines) > 1 else max(lines)
        print(f"{len(sizes)} {what}: {sum(lines)} lines, median {median(lines):.0f}, 90th percentile {tenth:.0f}; the longest:")
        print("".join(f"  {n:4} {where}\n" for n, where in sorted(sizes, reverse=True)[:5]), end="")
    broken = over(files, FILE_LINES) + over(functions, FUNCTION_LINES)
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
