"""The messages of a chat: their roles, contents, tool calls, and the flags that say which answers carry loss.

    {"role": "assistant", "content": "...", "reasoning_content": "...", "tool_calls": [...], "weight": 0}

A content is a string, null beside tool calls, or a list of text parts, which is joined. A flag of an answer is one of
`weight` (0 or 1, as in OpenAI's format), `train`, `training`, `loss` (a boolean) and `masked` (a boolean, the reverse).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from reparam.errors import DataError

Messages = Sequence[Mapping[str, Any]]

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
FLAGS = ("weight", "train", "training", "loss", "masked")


def checked_messages(value: object, source: str) -> tuple[Mapping[str, Any], ...]:
    """The checked messages of a chat row. Raises DataError with all problems, each with `source` ("file:line")."""
    if not isinstance(value, list):
        raise DataError([f'{source}: "messages" must be a list, got {kind_of(value)}'])
    if not value:
        raise DataError([f'{source}: "messages" is empty'])
    problems: list[str] = []
    result: list[Mapping[str, Any]] = []
    for number, message in enumerate(value, start=1):
        where = f"{source}: message {number}"
        if not isinstance(message, dict):
            problems.append(f"{where} must be an object, got {kind_of(message)}")
            continue
        found = [*_role_problems(message, where), *_call_problems(message, where), *_flag_problems(message, where)]
        content, problem = _content(message, where)
        problems.extend(found + ([problem] if problem else []))
        result.append({**message, "content": content})
    if problems:
        raise DataError(problems)
    return tuple(result)


def learned(message: Mapping[str, Any]) -> bool:
    """Whether the flags of a checked answer let it carry loss. Without flags it does.

    >>> learned({"role": "assistant", "content": "a", "weight": 0}), learned({"role": "assistant", "content": "a"})
    (False, True)
    """
    return all(bool(message[flag]) != (flag == "masked") for flag in FLAGS if message.get(flag) is not None)


def _content(message: Mapping[str, Any], where: str) -> tuple[str, str]:
    """The content as text, and a problem or ""."""
    content = message.get("content")
    if content is None:
        if message.get("tool_calls"):
            return "", ""
        return "", f'{where} has no "content"{near_key(message, ["content"])}'
    if isinstance(content, list):
        for number, part in enumerate(content, start=1):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else kind_of(part)
                return "", f"{where}: part {number} of the content is {kind!r}; only parts with text are supported"
        content = "".join(part["text"] for part in content)
    problem = string_problem(content, f'{where}: "content"')
    return ("", problem) if problem else (content, "")


def _role_problems(message: Mapping[str, Any], where: str) -> list[str]:
    if "role" not in message:
        return [f'{where} has no "role"{near_key(message, ["role"])}']
    role = message["role"]
    if role in ROLES:
        return []
    close = difflib.get_close_matches(str(role).lower(), ROLES, n=1)
    name = OTHER_NAMES.get(str(role).lower()) or (close[0] if close else None)
    hint = f"; did you mean {name!r}?" if name else ""
    return [f"{where} has the unknown role {role!r}; expected one of {', '.join(ROLES)}{hint}"]


def _call_problems(message: Mapping[str, Any], where: str) -> list[str]:
    calls = message.get("tool_calls")
    if calls is None:
        return []
    if not isinstance(calls, list):
        return [f'{where}: "tool_calls" must be a list, got {kind_of(calls)}']
    if calls and message.get("role") != "assistant":
        return [f"{where} has tool calls, but its role is {message.get('role')!r}; only an assistant calls tools"]
    return [
        f'{where}: tool call {number} must be an object with "name" and "arguments", or with them under "function"'
        for number, call in enumerate(calls, start=1)
        if not _is_call(call)
    ]


def _is_call(call: object) -> bool:
    if not isinstance(call, dict):
        return False
    function = call.get("function", call)
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _flag_problems(message: Mapping[str, Any], where: str) -> list[str]:
    problems = []
    for flag in FLAGS:
        value = message.get(flag)
        if value is None:
            continue
        if value not in (0, 1) or isinstance(value, float):
            expected = "0 or 1" if flag == "weight" else "true or false"
            problems.append(f'{where}: "{flag}" must be {expected}, got {value!r}')
        elif bool(value) != (flag == "masked") and flag != "masked" and message.get("role") != "assistant":
            problems.append(
                f'{where}: "{flag}" asks for a loss on a message of the role {message.get("role")!r}; only answers of '
                "an assistant carry loss (loss_on='all' trains on everything)"
            )
    return problems


def string_problem(value: object, where: str) -> str:
    """A sentence if the value is not a string that UTF-8 can encode; otherwise ""."""
    if not isinstance(value, str):
        return f"{where} must be a string, got {kind_of(value)}"
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, which no tokenizer accepts
        return f"{where} holds half of a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start}"
    return ""


def near_key(value: Mapping[str, Any], expected: Sequence[str]) -> str:
    """A hint if a key resembles an expected one; otherwise ""."""
    for key in value:
        close = difflib.get_close_matches(key.lower(), expected, n=1, cutoff=0.75)
        if close and key not in expected:
            return f'; did you mean "{close[0]}" instead of "{key}"?'
    return ""


def kind_of(value: object) -> str:
    """The JSON name of a value's type, with an article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
