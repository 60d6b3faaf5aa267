"""The registry of the kinds of sites, and the lookup of a module's kind.

A kind is one file in this folder: a subclass of `Adapted` decorated with `@kind("name")`. No other file has to change
when a kind is added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from reparam.sites.module import Adapted

KINDS: dict[str, type[Adapted]] = {}

_A = TypeVar("_A", bound=type[Adapted])


def kind(name: str) -> Callable[[_A], _A]:
    """Class decorator that registers a kind of site under `name`, which adapter files contain."""

    def register(cls: _A) -> _A:
        assert name not in KINDS, f"two kinds of sites are called {name}"
        cls.kind = name
        KINDS[name] = cls
        return cls

    return register


def kind_of(module: nn.Module) -> type[Adapted] | None:
    """The kind of this module, adapted or not; None if no kind claims it. At most one kind claims a module."""
    if isinstance(module, Adapted):
        return type(module)
    return next((cls for cls in KINDS.values() if cls.claims(module)), None)
