"""Advice in error messages: it names options under the command line, and calls elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_options: ContextVar[Collection[str] | None] = ContextVar("options of the command line", default=None)


@contextmanager
def on_command_line(options: Collection[str] = ()) -> Iterator[None]:
    """Give the advice of the command line inside the block; the command has these options."""
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


def advice(call: str, option: str) -> str:
    """What to do next: `option` under the command line, else `call`.

    >>> advice("call untie(model)", "pass --base.untie")
    'call untie(model)'
    >>> with on_command_line():
    ...     advice("call untie(model)", "pass --base.untie")
    'pass --base.untie'
    """
    return call if _options.get() is None else option


def can_set(option: str) -> bool:
    """Whether the option can be given: the command has it, or a program calls that can set all.

    >>> with on_command_line(["--max-length"]):
    ...     can_set("--max-length"), can_set("--data.too_long")
    (True, False)
    """
    options = _options.get()
    return options is None or option in options
