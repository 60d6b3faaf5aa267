"""The kinds of sites by name: where each is registered, and which of them a module is.

A kind is one file in this folder: a subclass of `Adapted` with `@kind("name")` on it. Adding one changes no other file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from reparam.sites.module import Adapted

KINDS: dict[str, type[Adapted]] = {}

_A = TypeVar("_A", bound=type[Adapted])


def kind(name: str) -> Callable[[_A], _A]:
    """Register a kind of site under `name`, which goes into files."""

    def register(cls: _A) -> _A:
        assert name not in KINDS, f"two kinds of sites are called {name}"
        cls.kind = name
        KINDS[name] = cls
        return cls

    return register


def kind_of(module: nn.Module) -> type[Adapted] | None:
    """The kind that claims this module, adapted or not; None where no kind does. At most one kind claims a module."""
    if isinstance(module, Adapted):
        return type(module)
    return next((cls for cls in KINDS.values() if cls.claims(module)), None)
