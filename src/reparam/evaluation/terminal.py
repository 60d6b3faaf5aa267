"""The function through which every command prints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.text import Text

from reparam.core.text import visible


def say(console: Console, what: RenderableType, *, style: str = "") -> None:
    """Print a line of text, or a table or another renderable of rich.

    Strings, also those in the cells and titles of a table, are printed as they are: brackets are no markup, `:words:`
    are no emoji, and numbers get no color, whatever the settings of `console`. A `Text` has its own styles. Control
    characters become visible. A line of text is not broken where the terminal ends.

    >>> say(Console(width=80), "out[/y] :key: \\x1b[31m")
    out[/y] :key: ␛[31m
    """
    line = isinstance(what, str | Text)
    console.print(_Plain(what), style=style or None, markup=False, highlight=False, soft_wrap=line)


def say_json(console: Console, values: Any) -> None:
    """Print values as JSON, with an escape sequence for every character that is not ASCII."""
    say(console, json.dumps(values, indent=2))


def say_line(console: Console, values: Any) -> None:
    """Print values as JSON on one line. Numbers that are not finite become null.

    >>> say_line(Console(width=80), {"step": 1, "loss": float("nan")})
    {"step": 1, "loss": null}
    """
    say(console, json.dumps(_finite(values), allow_nan=False))


def _finite(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def note(word: str, text: str, style: str = "yellow") -> Text:
    """A line that begins with a word in a style."""
    return Text.assemble((word, style), " ", text)


class _Plain:
    """Renders its content with strings as plain text, and without control characters."""

    def __init__(self, what: RenderableType) -> None:
        self.what = what

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in _console(console).render(self.what, options.update(markup=False, highlight=False)):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(_console(console), options, self.what)


class _Console(Console):
    def render_str(self, text: str, **settings: Any) -> Text:
        """Make a `Text` of the string, which then has the width of what is shown."""
        return super().render_str(visible(text), **settings)


def _console(console: Console) -> Console:
    """A console with the terminal of another one, which takes strings as they are."""
    return _Console(
        file=console.file,
        force_terminal=console.is_terminal,
        color_system=console.color_system,  # type: ignore[arg-type]
        width=console.width,
        legacy_windows=console.legacy_windows,
        markup=False,
        emoji=False,
        highlight=False,
    )
