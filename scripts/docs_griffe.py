"""Docstrings as Markdown for mkdocstrings: examples with `>>>` are code blocks, shapes are no links."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

# Code of both kinds, which stays as it is, or a bracket after another, which Markdown would take for a link.
BRACKETS = re.compile(r"(`[^`]*`|^(?: {4}|>>> ).*$)|\](\s?)\[", re.MULTILINE)
# A line that begins with >>>, and everything up to the next empty line.
EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


def markdown(text: str) -> str:
    """The docstring with shapes such as `[ids] [..., I]` as text, and each run of examples in a fence."""
    text = BRACKETS.sub(lambda found: found[1] or f"]{found[2]}\\[", text)
    return EXAMPLE.sub(lambda found: f"\n```pycon\n{found[0]}\n```\n", text)


class Doctests(Extension):
    """Runs on every object that has a docstring."""

    def on_object(self, *, obj: Object, **others: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
