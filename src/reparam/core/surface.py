"""Advice in error messages: it names options under the command line, and calls elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_command_line: ContextVar[bool] = ContextVar("command line", default=False)


@contextmanager
def on_command_line() -> Iterator[None]:
    """Give the advice of the command line inside the block."""
    token = _command_line.set(True)
    try:
        yield
    finally:
        _command_line.reset(token)


def advice(call: str, option: str) -> str:
    """What to do next: `option` under the command line, else `call`.

    >>> advice("call untie(model)", "pass --base.untie")
    'call untie(model)'
    >>> with on_command_line():
    ...     advice("call untie(model)", "pass --base.untie")
    'pass --base.untie'
    """
    return option if _command_line.get() else call
