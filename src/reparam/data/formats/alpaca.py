"""Alpaca's instructions: `instruction`, `output`, and optionally `input`, `system` and `history`. They become chats."""

from __future__ import annotations

from typing import Any

from reparam.data.formats.format import Format, chat_row, check_strings, read_json
from reparam.data.row import Row
from reparam.errors import DataError


def _read(value: dict[str, Any], source: str) -> Row:
    value.setdefault("input", "")
    value["input"] = value["input"] or ""
    check_strings(value, ("instruction", "input", "output"), source)
    question = "\n".join(part for part in (value.pop("instruction"), value.pop("input")) if part)
    history = read_json(value.pop("history", None)) or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise DataError([f'{source}: "history" must be a list of pairs of a question and an answer'])
    turns = [*history, (question, value.pop("output"))]
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    return chat_row(messages, value, source)


FORMAT = Format(
    ("instruction", "output"),
    '{"instruction": "...", "input": "...", "output": "..."}',
    _read,
    beside=("text",),  # the original data set holds each row as a text, too
)
