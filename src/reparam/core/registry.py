"""Methods and storages by name: where each is registered, and how it is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from reparam.core.base import Method, Storage
from reparam.core.checks import nearest

STORAGES: dict[str, type[Storage]] = {}


METHODS: dict[str, type[Method]] = {}


_S = TypeVar("_S", bound=type[Storage])


_M = TypeVar("_M", bound=type[Method])


def storage(name: str) -> Callable[[_S], _S]:
    """Register a storage under `name`."""

    def register(cls: _S) -> _S:
        assert name not in STORAGES, f"two storages are called {name}"
        cls.name = name
        STORAGES[name] = cls
        return cls

    return register


def method(name: str) -> Callable[[_M], _M]:
    """Register a method under `name`."""

    def register(cls: _M) -> _M:
        assert name not in METHODS, f"two methods are called {name}"
        cls.name = name
        METHODS[name] = cls
        return cls

    return register


def find_method(name: str) -> type[Method]:
    """The method registered under `name`. Raises ValueError that lists the names and the nearest one."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{nearest(name, METHODS)}: the methods are {', '.join(METHODS)}")
    return METHODS[name]


def find_storage(name: str) -> type[Storage]:
    """The storage registered under `name`. Raises ValueError that lists the names and the nearest one."""
    if name not in STORAGES:
        raise ValueError(f"unknown storage {name!r}{nearest(name, STORAGES)}: the storages are {', '.join(STORAGES)}")
    return STORAGES[name]
