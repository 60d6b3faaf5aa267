"""How an adapter is prompted: `prompt_format.json`, beside the files of an adapter in any format.

It says whether the adapter was trained on chats, completions or texts, and which chat template, system message and
thinking its chats had, if these were not the defaults of its base. It is a help for generation: without the file, an
adapter works as before. The template runs in the sandbox of `data/rendering.py`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

FILE = "prompt_format.json"


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How an adapter is prompted."""

    rows: Literal["chat", "completion", "text", "mixed"]
    """The kind of its training rows; mixed for chats and completions."""
    chat_template: str | None = None
    """The chat template, if it is not that of the base's tokenizer."""
    system: str | None = None
    """The system message of chats without one."""
    thinking: bool | None = None
    """Whether chats are rendered with thinking; None for the default of the template."""

    def content(self) -> bytes:
        """The content of the file."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()
