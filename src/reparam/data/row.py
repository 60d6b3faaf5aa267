"""A training row, whatever the file and the format it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

RowKind = Literal["chat", "completion", "text"]


@dataclass(frozen=True, slots=True)
class Row:
    """A training row. `kind` determines which fields hold its content."""

    kind: RowKind
    source: str
    """Where the row comes from, as "file:line" or "file:row"."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """Messages of a chat: dictionaries with a "role", a "content" and any other keys of the file."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, such as `tools`."""
    prompt: str = ""
    """Prompt of a completion row."""
    completion: str = ""
    """Answer of a completion row."""
    text: str = ""
    """Content of a text row."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """All other keys of the row."""

    @property
    def characters(self) -> int:
        """Number of characters of the content."""
        content = sum(len(message["content"]) for message in self.messages)
        return content + len(self.prompt) + len(self.completion) + len(self.text)

    def as_json(self) -> dict[str, Any]:
        """The row as an object of a JSONL file, which reads as the same row."""
        match self.kind:
            case "chat":
                content: dict[str, Any] = {"messages": list(self.messages)}
                if self.variables:
                    content["chat_template_kwargs"] = dict(self.variables)
            case "completion":
                content = {"prompt": self.prompt, "completion": self.completion}
            case "text":
                content = {"text": self.text}
        return {**self.columns, **content}
