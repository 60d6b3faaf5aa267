"""Print figures about the structure of the source: `python scripts/house.py [checkout] [--times]`.

The figures are: files and lines; the longest file and function; rooms (subpackages and top-level modules); import
cycles, and imports from a lower to a higher room (imports for annotations count too); and `isinstance` checks for a
method's class outside of `methods/`. With `--times`, also the number of tests and the CPU seconds of `--help`; for
this, run the script with the Python of the checkout's environment.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOMS = (
    *("core", "kernels", "data", "weights", "methods", "optim", "sites", "io", "adapter", "hf", "combine", "serve"),
    *("export", "evaluation", "train", "vision", "plan", "inspect", "compare", "recipes", "cli"),
)
Graph = dict[str, set[str]]


def imports(tree: ast.AST, source: Path) -> set[str]:
    """Dotted names of the modules of `reparam` that a file imports."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                path = source / f"{node.module}.{alias.name}".replace(".", "/")
                is_file = path.with_suffix(".py").exists() or path.is_dir()
                found.add(f"{node.module}.{alias.name}" if is_file else node.module)
    return {name for name in found if name.startswith("reparam.")}


def circles(graph: Graph) -> list[list[str]]:
    """Strongly connected components with at least two nodes (Tarjan's algorithm)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in number:
            visit(node)
    return found


def levels(graph: Graph) -> int:
    """Number of nodes on the longest path of a graph without cycles."""
    depth: dict[str, int] = {}

    def of(node: str) -> int:
        if node not in depth:
            depth[node] = 0  # ends the recursion in a cycle
            depth[node] = 1 + max((of(other) for other in graph.get(node, ())), default=0)
        return depth[node]

    return max(of(node) for node in graph)


def questions(trees: dict[str, ast.AST]) -> list[str]:
    """Places (file:line) outside `methods/` that call isinstance with a class defined in `methods/`."""
    found = []
    for file, tree in trees.items():
        classes = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reparam.methods")
            for alias in node.names
        }
        for node in ast.walk(tree) if not file.startswith("methods/") else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                if asked & classes:
                    found.append(f"{file}:{node.lineno}")
    return found


def cpu_seconds(command: list[str], times: int = 3) -> float:
    """Median CPU seconds of a command and its children."""
    found = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(found)


def timed(root: Path) -> Iterator[tuple[str, object]]:
    """Figures that need the checkout's environment: number of tests, and CPU seconds of `--help`."""
    os.environ["PYTHONPATH"] = str(root / "src")
    listed = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--co",
            "-p",
            "no:cacheprovider",
            str(root / "tests"),
            str(root / "src"),
        ],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    ).stdout
    counted = re.search(r"^(\d+)(?:/\d+)? tests? collected", listed, re.MULTILINE)
    yield "tests", counted[1] if counted else sum("::" in line for line in listed.splitlines())
    main = "import sys; sys.argv[0] = 'reparam'; from reparam.cli import main; main()"
    yield "CPU seconds of --help", f"{cpu_seconds([sys.executable, '-c', main, '--help']):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--times", action="store_true", help="also count tests and time --help")
    options = parser.parse_args()
    source = options.checkout.resolve() / "src"
    package = source / "reparam"
    texts = {p.relative_to(package).as_posix(): p.read_text() for p in sorted(package.rglob("*.py"))}
    trees: dict[str, ast.AST] = {file: ast.parse(text) for file, text in texts.items()}
    sizes = {file: len(text.splitlines()) for file, text in texts.items()}
    functions = {
        f"{file}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    loose = sorted(file for file in texts if "/" not in file and file not in ("__init__.py", "__main__.py"))
    graph: Graph = {
        "reparam." + file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): imports(tree, source)
        for file, tree in trees.items()
        if file != "__init__.py"
    }
    rooms: Graph = {}
    for name, others in graph.items():
        own = name.split(".")[1]
        rooms.setdefault(own, set()).update({other.split(".")[1] for other in others} - {own})
    upward = [
        f"{room} -> {other}"
        for room, others in rooms.items()
        for other in others
        if room in ROOMS and other in ROOMS and ROOMS.index(other) > ROOMS.index(room)
    ]
    file, function = max(sizes, key=lambda f: sizes[f]), max(functions, key=lambda f: functions[f])
    asked = questions(trees)
    figures: list[tuple[str, object]] = [
        ("files", len(texts)),
        ("lines", sum(sizes.values())),
        ("longest file", f"{file}, {sizes[file]}"),
        ("longest function", f"{function}, {functions[function]}"),
        ("rooms (subpackages and top-level modules)", len(rooms)),
        ("top-level modules", f"{len(loose)}: {', '.join(loose)}" if loose else 0),
        ("imports between rooms", sum(len(others) for others in rooms.values())),
        ("levels of rooms", levels(rooms)),
        ("import cycles between files", len(circles(graph))),
        ("import cycles between rooms", len(circles(rooms))),
        ("imports from a lower to a higher room", f"{len(upward)}: {', '.join(upward)}" if upward else 0),
        ("isinstance checks for a method outside methods/", len(asked)),
    ]
    if options.times:
        figures += timed(options.checkout.resolve())
    width = max(len(name) for name, _ in figures)
    for name, value in figures:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
