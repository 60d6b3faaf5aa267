"""The registries of methods and storages by name.

An installed package can add its own with an entry point in the group `reparam.methods` or `reparam.storages`. The entry
point has the name of the method or storage and refers to the module, or a class in it, whose import registers it. Entry
points are loaded when a name that is not registered is looked up.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar

from reparam.core.base import Storage
from reparam.core.checks import nearest
from reparam.core.method import Method

STORAGES: dict[str, type[Storage]] = {}


METHODS: dict[str, type[Method]] = {}


_S = TypeVar("_S", bound=type[Storage])


_M = TypeVar("_M", bound=type[Method])


def storage(name: str) -> Callable[[_S], _S]:
    """Class decorator that registers a storage under `name`."""

    def register(cls: _S) -> _S:
        assert name not in STORAGES, f"two storages are called {name}"
        cls.name = name
        STORAGES[name] = cls
        return cls

    return register


def method(name: str) -> Callable[[_M], _M]:
    """Class decorator that registers a method under `name`."""

    def register(cls: _M) -> _M:
        assert name not in METHODS, f"two methods are called {name}"
        cls.name = name
        METHODS[name] = cls
        return cls

    return register


def find_method(name: str) -> type[Method]:
    """The method class registered under `name`. Raises ValueError, which lists the known names, if there is none."""
    if name not in METHODS:
        load_installed("reparam.methods")
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{nearest(name, METHODS)}: the methods are {', '.join(METHODS)}")
    return METHODS[name]


def find_storage(name: str) -> type[Storage]:
    """The storage class registered under `name`. Raises ValueError, which lists the known names, if there is none."""
    if name not in STORAGES:
        load_installed("reparam.storages")
    if name not in STORAGES:
        raise ValueError(f"unknown storage {name!r}{nearest(name, STORAGES)}: the storages are {', '.join(STORAGES)}")
    return STORAGES[name]


_loaded: set[tuple[str, str, str]] = set()


def load_installed(group: str) -> None:
    """Load the entry points of this group from all installed packages, each once.

    Warns with the package's name if an entry point cannot be loaded.
    """
    for entry in entry_points(group=group):
        key = (group, entry.name, entry.value)
        if key in _loaded:
            continue
        _loaded.add(key)
        try:
            entry.load()
        except Exception as error:  # a third-party package may raise anything
            package = entry.dist.name if entry.dist is not None else entry.value
            warnings.warn(
                f"package {package} failed to register {entry.name!r} ({group}): {type(error).__name__}: {error}",
                stacklevel=3,
            )
