"""The structure of the source: packages and their order, allowed imports, the length of files."""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import reparam

ROOT = Path(reparam.__file__).parent
ROOMS = (  # from the bottom up: a package imports only from those before it
    "core",
    "kernels",
    "data",
    "weights",
    "methods",
    "optim",
    "sites",
    "io",
    "adapter",
    "hf",
    "images",
    "combine",
    "serve",
    "export",
    "evaluation",
    "tasks",
    "train",
    "vision",
    "plan",
    "inspect",
    "compare",
    "recipes",
    "cli",
)
LOOSE = {"__init__.py", "__main__.py", "errors.py"}  # the only files outside the packages; `errors` imports nothing
LIBRARY = {
    "core",
    "kernels",
    "weights",
    "methods",
    "optim",
    "sites",
    "io",
    "adapter",
}  # need only torch and safetensors
APART = ({"weights", "methods"}, {"compare", "recipes"}, {"methods", "optim"})  # these never import each other
CORE = {"torch", "safetensors", "numpy"}
OPEN = {
    "adapter/attach.py: attach",  # takes **, the settings of the method that it is given by name
    "sites/experts.py: forward",  # of any class of experts
    "sites/router.py: forward",  # of any class of routers
    "adapter/mixed.py: _generated",  # stands in for the model's own `generate`
    "sites/replaced.py: forward",  # of any module that adapters train whole
}
COMPILERS = {"numba", "llvmlite", "triton"}  # in kernels
MOST_LINES = 320
LONGER = {"train/trainer.py": 370}  # to be split; nothing is to be added here


@functools.cache
def files() -> dict[str, ast.Module]:
    """The syntax tree of every file of the package."""
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def room(file: str) -> str:
    """The package (folder) of a file or a dotted module name; the file itself if it is in no folder."""
    return file.removeprefix("reparam.").replace("/", ".").removesuffix(".py").split(".")[0]


def dotted(file: str) -> str:
    return "reparam." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_file(name: str) -> bool:
    path = ROOT.parent / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that a file imports anywhere, including imports for annotations."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            files = {name for name in submodules if is_file(name)}
            found |= files | ({node.module} if len(files) < len(submodules) else set())
    return found


def ours(file: str) -> set[str]:
    """Modules of the package that a file imports."""
    return {name for name in imported(files()[file]) if name.split(".")[0] == "reparam"}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_file_is_in_a_room() -> None:
    assert sorted(name for name in files() if "/" not in name and name not in LOOSE) == []
    assert sorted({room(name) for name in files() if "/" in name} - set(ROOMS)) == []


def test_imports_point_one_way() -> None:
    """Packages import only from those before them in the list; `reparam` itself, which re-exports, comes last."""
    wrong = [
        f"{file} imports {name}"
        for file in files()
        if "/" in file
        for name in ours(file)
        if name == "reparam" or (room(name) in ROOMS and ROOMS.index(room(name)) > ROOMS.index(room(file)))
    ]
    wrong += [f"{file} imports {name}" for file in ("errors.py",) if file in files() for name in ours(file)]
    assert wrong == []


def test_some_rooms_do_not_know_each_other() -> None:
    wrong = [
        f"{file} imports {name}"
        for file in files()
        for pair in APART
        for name in ours(file)
        if room(file) in pair and room(name) in pair and room(file) != room(name)
    ]
    assert wrong == []


def test_there_are_no_circles() -> None:
    """There are no import cycles between files, including imports for annotations."""
    arrows = {dotted(file): ours(file) for file in files() if file != "__init__.py"}
    done: set[str] = set()
    circles: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circles.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for other in sorted(arrows.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in arrows:
        visit(name, ())
    assert circles == []


def asked_for(tree: ast.AST, classes: set[str]) -> set[str]:
    """Method classes that a file checks for: by isinstance, issubclass, a type comparison, or a match pattern."""
    names = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reparam.methods")
        for alias in node.names
        if alias.name in classes
    }

    def within(part: ast.AST) -> set[str]:
        found = {names[n.id] for n in ast.walk(part) if isinstance(n, ast.Name) and n.id in names}
        return found | {n.attr for n in ast.walk(part) if isinstance(n, ast.Attribute) and n.attr in classes}

    def calls(part: ast.AST, *functions: str) -> bool:
        return isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in functions

    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and calls(node, "isinstance", "issubclass"):
            found |= within(node.args[1])
        elif isinstance(node, ast.Compare) and any(calls(part, "type") for part in (node.left, *node.comparators)):
            found |= within(node)
        elif isinstance(node, ast.MatchClass):
            found |= within(node.cls)
    return found


def test_nobody_asks_for_the_class_of_a_method() -> None:
    """Other code asks through attributes with defaults, in `core/method.py` or on an `Update`."""
    classes = {
        node.name
        for file, tree in files().items()
        if room(file) == "methods"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert {"LoRA", "LoRAUpdate", "Mixture", "Prompting"} <= classes
    asking = {file for file, tree in files().items() if room(file) != "methods" and asked_for(tree, classes)}
    assert asking == set()


def test_the_library_needs_torch_and_safetensors_alone() -> None:
    wrong = []
    for file in files():
        if room(file) in LIBRARY or file in LOOSE - {"__main__.py"}:
            allowed = CORE | {"reparam"} | set(sys.stdlib_module_names)
            allowed |= COMPILERS if room(file) == "kernels" else set()
            allowed |= {"xxhash"} if file == "core/versions.py" else set()  # CRC-32 without it
            found = {name.split(".")[0] for name in imported(files()[file])} - allowed
            wrong += [f"{file} imports {name}" for name in sorted(found)]
            open_ = {f"{file}: {f.name}": f.args.kwarg.arg for f in functions(files()[file]) if f.args.kwarg}
            wrong += [f"{name} takes **{arg}" for name, arg in open_.items() if name not in OPEN]
    assert wrong == []


def test_files_stay_readable() -> None:
    lines = {file: len((ROOT / file).read_text().splitlines()) for file in files()}
    wrong = [f"{file}: {n} lines" for file, n in lines.items() if n > LONGER.get(file, MOST_LINES)]
    wrong += [f"{file} needs no exception any more" for file in LONGER if lines[file] <= MOST_LINES]
    assert wrong == []


def public(tree: ast.AST, path: str = "") -> dict[str, ast.AST]:
    """Public functions, classes and methods by path, including properties and overloads."""
    found: dict[str, ast.AST] = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found[path + node.name] = node
            if isinstance(node, ast.ClassDef):
                found |= public(node, f"{path}{node.name}.")
    return found


def test_whatever_is_public_has_a_docstring() -> None:
    bare = [file for file, tree in files().items() if not ast.get_docstring(tree)]
    bare += [
        f"{file}: {name}"
        for file, tree in files().items()
        for name, node in public(tree).items()
        if not ast.get_docstring(node)  # type: ignore[arg-type]
    ]
    assert bare == []


def test_nothing_is_unpickled_or_executed() -> None:
    banned = {"torch.load", "torch.save", "pickle.load", "pickle.loads", "pickle.dumps", "eval", "exec"}
    allowed = {"io/peft_weights.py: torch.load(file, map_location='cpu', weights_only=True)"}  # tensors alone
    calls = [
        f"{file}: {ast.unparse(node)}"
        for file, tree in files().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in banned
    ]
    assert sorted(calls) == sorted(allowed)


def test_a_wrong_arrow_is_seen() -> None:
    """The check finds imports inside functions and those for annotations."""
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from reparam.adapter.adapter import Adapter\n"
        "def f():\n    from reparam.adapter import merge\n    import numba.core\n"
    )
    assert imported(tree) == {"typing", "reparam.adapter.adapter", "reparam.adapter.merge", "numba.core"}
    assert room("weights/dense.py") == room("reparam.weights.dense") == "weights"


def test_a_class_that_is_asked_for_is_seen() -> None:
    start = "from reparam.methods.lora import LoRA as Plain, seeded\nimport reparam.methods.dora\n"
    for line in (
        "isinstance(a, int | Plain)",
        "issubclass(a, (Plain, int))",
        "type(a) is Plain",
        "type(a) in (int, Plain)",
        "isinstance(a, reparam.methods.lora.LoRA)",
        "match a:\n    case Plain(): pass",
    ):
        assert asked_for(ast.parse(start + line), {"LoRA"}) == {"LoRA"}
    assert not asked_for(ast.parse(start + "isinstance(Plain(), int) or seeded(0, type(a))"), {"LoRA"})
