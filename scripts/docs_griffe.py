"""Convert docstrings to Markdown for mkdocstrings: `>>>` examples become code blocks, and shapes are no links."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

# Inline code and code lines, which stay as they are; or a bracket after another, which Markdown would make a link.
BRACKETS = re.compile(r"(`[^`]*`|^(?: {4}|>>> ).*$)|\](\s?)\[", re.MULTILINE)
# A line that starts with >>>, and all lines up to the next empty one.
EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


def markdown(text: str) -> str:
    """Escape shapes such as `[ids] [..., I]` in a docstring, and put each block of examples in a code fence."""
    text = BRACKETS.sub(lambda found: found[1] or f"]{found[2]}\\[", text)
    return EXAMPLE.sub(lambda found: f"\n```pycon\n{found[0]}\n```\n", text)


class Doctests(Extension):
    """A griffe extension that converts every docstring."""

    def on_object(self, *, obj: Object, **others: Any) -> None:
        """Convert the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
