"""Read the docstrings under the fields of a dataclass from its source."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys


@functools.cache
def documentation(cls: type) -> dict[str, str]:
    """The docstrings under the fields of a dataclass, inherited fields included, by field name.

    Empty if the source is not available.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _of_module(base.__module__).get(base.__qualname__, {})
    return found


@functools.cache
def _of_module(module: str) -> dict[str, dict[str, str]]:
    """The field docstrings of every top-level class of a module: class name -> field name -> text."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError):  # no source: an interactive session, or bytecode only
        return {}
    return {node.name: _of_class(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _of_class(tree: ast.ClassDef) -> dict[str, str]:
    return {
        ast.unparse(field.target): str(text.value.value)
        for field, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
