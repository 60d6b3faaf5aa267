"""Prompts and completions. Both are strings, or both are lists of messages, as in TRL's conversational format."""

from __future__ import annotations

from typing import Any

from reparam.data.formats.format import Format, chat_row, check_strings, without_loss
from reparam.data.row import Row
from reparam.errors import DataError


def _read(value: dict[str, Any], source: str) -> Row:
    prompt, completion = value.pop("prompt"), value.pop("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return chat_row([*without_loss(prompt), *completion], value, source)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise DataError([f'{source}: "prompt" and "completion" must both be strings, or both lists of messages'])
    check_strings({"prompt": prompt, "completion": completion}, ("prompt", "completion"), source)
    return Row("completion", source, prompt=prompt, completion=completion, columns=value)


FORMAT = Format(("prompt", "completion"), '{"prompt": "2 + 2 =", "completion": " 4"}', _read)
