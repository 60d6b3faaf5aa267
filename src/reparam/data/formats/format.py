"""What a format of rows is, and what several formats share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from reparam.data.messages import checked_messages, string_problem
from reparam.data.row import Row
from reparam.errors import DataError

MEDIA = ("images", "image", "audio", "audios", "video", "videos")
RESERVED = {"messages", "add_generation_prompt"}


class Format(NamedTuple):
    """A format of rows. Each is one file of this folder."""

    keys: tuple[str, ...]
    """A row has this format if it has all of these keys."""
    example: str
    """A row, as JSON."""
    read: Callable[[dict[str, Any], str], Row]
    """Makes the row from an object with these keys, and "file:line". Raises DataError with all problems."""
    beside: tuple[str, ...] = ()
    """Keys of other formats that data sets of this format also have; they are not used."""


def chat_row(messages: object, columns: dict[str, Any], source: str) -> Row:
    """A chat. The keys that the chat template reads are taken out of the columns."""
    if found := [f'"{key}"' for key in MEDIA if columns.get(key)]:
        raise DataError([f"{source}: {found[0]}: only text is supported; remove the key from the row"])
    variables = _variables(columns, source)
    system = columns.pop("system", None)
    if system and isinstance(messages, list):
        if problem := string_problem(system, f'{source}: "system"'):
            raise DataError([problem])
        if any(isinstance(message, dict) and message.get("role") == "system" for message in messages):
            raise DataError([f'{source}: has "system" and a message with this role; keep one of them'])
        messages = [{"role": "system", "content": system}, *messages]
    return Row("chat", source, messages=checked_messages(messages, source), variables=variables, columns=columns)


def without_loss(prompt: Sequence[Any]) -> list[Any]:
    """The messages of a prompt: only the answers that follow it carry loss."""
    return [
        {**message, "train": False} if isinstance(message, dict) and message.get("role") == "assistant" else message
        for message in prompt
    ]


def _variables(columns: dict[str, Any], source: str) -> dict[str, Any]:
    """The variables of the chat template, taken out of the columns."""
    found: dict[str, Any] = {}
    for key in ("chat_template_kwargs", "tools", "documents"):
        value = read_json(columns.pop(key, None))
        if value is None:
            continue
        if key == "chat_template_kwargs":
            if not isinstance(value, dict) or RESERVED & value.keys():
                raise DataError([f'{source}: "{key}" must be an object without {" and ".join(sorted(RESERVED))}'])
            found |= value
        elif not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise DataError([f'{source}: "{key}" must be a list of objects'])
        elif value:
            found[key] = value
    return found


def read_json(value: object) -> Any:
    """The value that a string holds as JSON, as tables do; None for an empty string, and other values as they are."""
    if isinstance(value, str):
        if not value.strip():
            return None
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def check_strings(value: dict[str, Any], keys: Sequence[str], source: str) -> None:
    """Raise DataError unless these keys hold strings that UTF-8 can encode."""
    problems = [problem for key in keys if (problem := string_problem(value[key], f'{source}: "{key}"'))]
    if problems:
        raise DataError(problems)
