"""Which modules another module reads the weight of without calling them, so that an update there would do nothing.

Found in the source of the classes: `self.dt_proj.weight @ x` in a method of Mamba's mixer, for instance. Reads of a
dtype, a shape or a device do not count; neither do methods that initialize or tie weights, nor branches that a setting
of the module turns off (Bloom's `if self.pretraining_tp > 1`).
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from reparam.sites.module import Adapted
from reparam.sites.replaced import Replaced
from reparam.sites.walk import base_parameters, walk
from reparam.sites.wrapped import at

METADATA = {
    *("data_ptr", "device", "dim", "dtype", "element_size", "is_cuda", "is_floating_point", "is_meta", "layout"),
    *("ndim", "numel", "requires_grad", "shape", "size"),
}
COMPARISONS: dict[type[ast.cmpop], Any] = {
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not},
    **{ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge},
}
QUESTIONS = {"getattr", "hasattr", "id", "isinstance"}
SETUP = ("__init__", "_init_", "get_", "init_", "post_init", "reset_", "resize_", "_resize_", "set_", "tie_", "_tie_")


class Read(NamedTuple):
    """One place in the source where `self.<child>.weight` or `.bias` is read."""

    child: str
    """Path of the module below the one that reads it."""
    place: str
    """File and line."""
    conditions: tuple[tuple[ast.expr, bool], ...]
    """The tests of the `if` statements around it, and the results that lead there."""


def read_without_call(model: nn.Module) -> dict[str, str]:
    """Paths of modules whose weight or bias is read without a call, with the reason why no update can be there."""
    found: dict[str, str] = {}
    for path, parent in (("", model), *walk(model)):
        if isinstance(parent, Adapted | Replaced | nn.TransformerEncoderLayer):  # the last is told by `announce`
            continue
        for read in _reads_of(type(parent)):  # type: ignore[arg-type]
            child = f"{path}.{read.child}".lstrip(".")
            if child not in found and all(_holds(test, parent) in (result, None) for test, result in read.conditions):
                found[child] = f"{type(parent).__name__} reads its parameters without calling it ({read.place})"
    return found


def never_called(model: nn.Module) -> dict[str, str]:
    """Paths of modules that only lend their weight to tied ones, where nothing is tied, with the reason.

    BART's `shared`, for instance: its encoder and decoder have embeddings of their own, tied to it.
    """
    found: dict[str, str] = {}
    held = [id(parameter) for _, parameter in base_parameters(model)]
    for path, parent in (("", model), *walk(model)):
        for source in (getattr(type(parent), "_tied_weights_keys", None) or {}).values():
            child = parent._modules.get(source.removesuffix(".weight"))
            weight = None if child is None else child._parameters.get("weight")
            name = source.removesuffix(".weight")
            if weight is not None and held.count(id(weight)) == 1 and not _uses(type(parent), name):  # type: ignore[arg-type]
                found[f"{path}.{name}".lstrip(".")] = (
                    f"{type(parent).__name__} does not call it, and nothing is tied to it, so an update has no effect"
                )
    return found


@functools.cache
def _uses(cls: type[nn.Module], child: str) -> bool:
    """Whether a method of the classes that define `forward` mentions `self.<child>`, or the embedding by its getter."""
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for method in _methods(base) if "forward" in vars(base) else ():
            names = {node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute)}
            if not method.name.startswith(SETUP) and names & {child, "get_input_embeddings"}:
                return True
    return False


def reads_setting(model: nn.Module, name: str) -> bool:
    """Whether a forward of the model reads this setting of its configuration."""
    kinds = {type(module) for module in model.modules()}
    return any(_reads_setting(kind, name) for kind in kinds)  # type: ignore[arg-type]


@functools.cache
def _reads_setting(cls: type[nn.Module], name: str) -> bool:
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for method in _methods(base) if _mentions(base, name) else ():
            attributes = (node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute))
            if not method.name.startswith(SETUP) and name in attributes:
                return True
    return False


def _mentions(cls: type, name: str) -> bool:
    """Whether the file of the class contains this name: quicker than parsing it."""
    try:
        return name in inspect.getsource(inspect.getmodule(cls) or cls)
    except (OSError, TypeError):
        return False


def announce(model: nn.Module, path: str, module: nn.Module) -> list[nn.TransformerEncoder]:
    """Let torch's encoder call the module that will be at `path` in eval mode, too, instead of reading its parameters.

    A layer does that if one of its modules has a hook. The whole encoder packs padded batches into nested tensors,
    which updates cannot read: that is turned off. Returns the encoders for which it was.
    """
    above = [at(model, path[:end]) for end, letter in enumerate(path) if letter == "."]
    if not any(isinstance(parent, nn.TransformerEncoderLayer) for parent in above):
        return []
    if _nothing not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_nothing)
    encoders = [e for e in (model, *above) if isinstance(e, nn.TransformerEncoder) and e.use_nested_tensor]
    for encoder in encoders:
        encoder.use_nested_tensor = False
    return encoders


def _nothing(module: nn.Module, args: object) -> None:
    """A hook without effect."""


@functools.cache
def _reads_of(cls: type[nn.Module]) -> tuple[Read, ...]:
    """The reads in the methods of a class and its bases; none where the source is not at hand."""
    found: list[Read] = []
    seen: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for method in _methods(base):
            if method.name not in seen and not method.name.startswith(SETUP):
                found += _reads(method, inspect.getsourcefile(base) or "")
            seen.add(method.name)
    return tuple(found)


def _methods(cls: type) -> list[ast.FunctionDef]:
    try:
        node: ast.AST | None = _parsed(inspect.getsourcefile(cls))
    except (OSError, TypeError, SyntaxError):
        return []
    for name in cls.__qualname__.split("."):
        node = next((n for n in getattr(node, "body", []) if isinstance(n, ast.ClassDef) and n.name == name), None)
    return [n for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef)]


@functools.cache
def _parsed(file: str | None) -> ast.Module:
    if file is None:
        raise OSError("no source")
    with open(file, encoding="utf-8") as source:
        return ast.parse(source.read())


def _reads(method: ast.FunctionDef, file: str) -> Iterator[Read]:
    above: dict[ast.AST, ast.AST] = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):
        if not isinstance(node, ast.Attribute) or node.attr not in ("weight", "bias"):
            continue
        child = _path(node.value)
        if child and isinstance(node.ctx, ast.Load) and not _asks(node, above[node]):
            yield Read(child, f"{file.rpartition('/')[2]}:{node.lineno}", tuple(_conditions(node, above)))


def _path(node: ast.AST) -> str:
    """`self.a.b` as "a.b"; "" for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else ""


def _asks(node: ast.AST, parent: ast.AST) -> bool:
    """Whether this use of a parameter does not compute with it."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in METADATA
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in QUESTIONS
    return isinstance(parent, ast.Compare)


def _conditions(node: ast.AST, above: dict[ast.AST, ast.AST]) -> Iterator[tuple[ast.expr, bool]]:
    """The tests of the `if` statements around a node, with the result that leads to it."""
    while node in above:
        node, inner = above[node], node
        if isinstance(node, ast.If) and inner is not node.test:
            yield node.test, inner in node.body


def _holds(test: ast.expr, parent: nn.Module) -> bool | None:
    """The result of a test on the settings of a module; None where it depends on anything else."""
    try:
        return bool(_value(test, parent))
    except (AttributeError, KeyError, TypeError):
        return None


def _value(node: ast.expr, parent: nn.Module) -> Any:
    """The value of an expression of attributes of `self`, constants and comparisons. Raises KeyError for others."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute) and (path := _path(node)):
        return operator.attrgetter(path)(parent)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _value(node.operand, parent)
    if isinstance(node, ast.BoolOp):
        found = [_holds(value, parent) for value in node.values]
        ends = isinstance(node.op, ast.Or)
        if ends not in found and None in found:
            raise KeyError(type(node))
        return ends if ends in found else not ends
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return COMPARISONS[type(node.ops[0])](_value(node.left, parent), _value(node.comparators[0], parent))
    raise KeyError(type(node))
