"""Training rows as they stand in a JSONL file: one JSON object on each line, in one of three formats.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}     chat
    {"prompt": "...", "completion": "..."}                                                          completion
    {"text": "..."}                                                                                 text

Other keys (a task, a score) are kept in `Row.columns`. One file may hold chats and completions, because both are a
prompt and an answer that carries the loss. Plain text does not mix with them: its whole text carries loss, long rows
are split instead of cut, and its score is bits per byte, so the figures of a mixed file would mean nothing.

Reading checks everything and reports all problems at once, each with its file and line.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reparam.errors import DataError

RowKind = Literal["chat", "completion", "text"]

ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = ("messages", "prompt", "completion", "text")
FORMATS = '"messages", or "prompt" and "completion", or "text"'
OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}


@dataclass(frozen=True, slots=True)
class Row:
    """One training row. Which of the fields holds its content depends on `kind`."""

    kind: RowKind
    source: str
    """Where it comes from, "file:line"."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """Of a chat: dictionaries with a "role", a "content" and whatever else the file had."""
    prompt: str = ""
    """Of a completion: what comes before the answer."""
    completion: str = ""
    """Of a completion: the answer."""
    text: str = ""
    """Of a text row."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The keys that are not part of the format."""


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a JSONL file (UTF-8, with or without a byte order mark; blank lines are skipped).

    Raises DataError: no such file, an empty one, bytes that are not UTF-8, malformed JSON (line and column), a row
    that is not an object, has none or several of the formats, wrong types, an unknown role, missing content, or text
    rows beside rows of another format.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "rows.jsonl"
    >>> _ = file.write_text('{"prompt": "2 + 2 =", "completion": " 4", "task": "sums"}')
    >>> row = read_rows(file)[0]
    >>> row.kind, row.completion, row.columns["task"]
    ('completion', ' 4', 'sums')
    """
    path = Path(path)
    content = _content(path)
    rows: list[Row] = []
    problems: list[str] = []
    offset = 0  # of the line's first byte
    for number, line in enumerate(content.split(b"\n"), start=1):
        source = f"{path}:{number}"
        try:
            value = _parse(line, source, offset=offset, first=number == 1)
            if value is not None:
                rows.append(_row(value, source))
        except DataError as error:
            problems.extend(error.problems)
        offset += len(line) + 1
    problems.extend(_mixture(rows))
    if not rows and not problems:
        problems.append(f"{path}: the file is empty; expected one JSON object on each line with {FORMATS}")
    if problems:
        raise DataError(problems)
    return rows


def _content(path: Path) -> bytes:
    """The file's bytes. Raises DataError naming the nearest files when it does not exist."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        message = f"{path}: no such file"
        if not path.parent.is_dir():
            raise DataError([f"{message}, nor is there a folder {path.parent}"]) from None
        names = sorted(p.name for p in path.parent.iterdir() if p.is_file())
        near = difflib.get_close_matches(path.name, names, cutoff=0.5) or [n for n in names if n.endswith(".jsonl")][:3]
        hint = f"; that folder has {', '.join(near)}" if near else ""
        raise DataError([message + hint]) from None
    except IsADirectoryError:
        raise DataError([f"{path}: a folder; name one JSONL file in it"]) from None
    except OSError as error:
        raise DataError([f"{path}: cannot be read: {error.strerror}"]) from error


def _parse(line: bytes, source: str, *, offset: int, first: bool) -> dict[str, Any] | None:
    """The object on one line, or None if the line is blank. `bias_delta` is where the line begins in the file."""
    if first and line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError([f"{source}: the file is UTF-16; save it as UTF-8"])
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError([f"{source}: byte 0x{line[error.start]:02x} at offset {at:,} is not UTF-8"]) from None
    if first:
        text = text.removeprefix("\ufeff")  # byte order mark
    if not text.strip():
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; JSONL has one complete object on each line" if first and text.strip() in ("[", "{", "[{") else ""
        raise DataError([f"{source}:{error.colno}: malformed JSON: {error.msg}{hint}"]) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets nested as deep
        raise DataError([f"{source}: malformed JSON: {error}"]) from None
    if not isinstance(value, dict):
        raise DataError([f"{source}: expected an object with {FORMATS}, got {_kind_of(value)}"])
    return value


def _row(value: dict[str, Any], source: str) -> Row:
    """The row in one object. Raises DataError with everything that is wrong with it."""
    present = [key for key in KEYS if key in value]
    columns = {k: v for k, v in value.items() if k not in KEYS}
    match present:
        case ["messages"]:
            return Row("chat", source, messages=_messages(value["messages"], source), columns=columns)
        case ["prompt", "completion"]:
            _strings(value, present, source)
            return Row("completion", source, prompt=value["prompt"], completion=value["completion"], columns=columns)
        case ["text"]:
            _strings(value, present, source)
            if not value["text"]:
                raise DataError([f'{source}: "text" is empty'])
            return Row("text", source, text=value["text"], columns=columns)
        case ["prompt"] | ["completion"]:
            other = "completion" if present == ["prompt"] else "prompt"
            raise DataError([f'{source}: "{present[0]}" without "{other}"{_nearest(value, [other])}'])
        case []:
            has = ", ".join(f'"{k}"' for k in list(value)[:6]) or "no keys"
            raise DataError([f"{source}: expected {FORMATS}; the row has {has}{_nearest(value, KEYS)}"])
        case _:
            keys = ", ".join(f'"{k}"' for k in present)
            raise DataError([f"{source}: several formats in one row ({keys}); keep one of {FORMATS}"])


def _strings(value: dict[str, Any], keys: Sequence[str], source: str) -> None:
    """Check that these keys hold text that can be encoded."""
    problems = [problem for key in keys if (problem := _string_problem(value[key], f'{source}: "{key}"'))]
    if problems:
        raise DataError(problems)


def _string_problem(value: object, where: str) -> str | None:
    if not isinstance(value, str):
        return f"{where} must be a string, got {_kind_of(value)}"
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no tokenizer can read it
        return f"{where} holds half of a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start}"
    return None


def _messages(value: object, source: str) -> tuple[Mapping[str, Any], ...]:
    """The checked messages of a chat row."""
    if not isinstance(value, list):
        raise DataError([f'{source}: "messages" must be a list, got {_kind_of(value)}'])
    if not value:
        raise DataError([f'{source}: "messages" is empty'])
    problems: list[str] = []
    for number, message in enumerate(value, start=1):
        where = f"{source}: message {number}"
        if not isinstance(message, dict):
            problems.append(f"{where} must be an object, got {_kind_of(message)}")
            continue
        problems.extend(_role_problems(message, where))
        if message.get("content") is None:
            problems.append(f'{where} has no "content"{_nearest(message, ["content"])}')
        elif problem := _string_problem(message["content"], f'{where}: "content"'):
            problems.append(problem)
    if problems:
        raise DataError(problems)
    return tuple(value)


def _role_problems(message: dict[str, Any], where: str) -> list[str]:
    if "role" not in message:
        return [f'{where} has no "role"{_nearest(message, ["role"])}']
    role = message["role"]
    if role in ROLES:
        return []
    close = difflib.get_close_matches(str(role).lower(), ROLES, n=1)
    name = OTHER_NAMES.get(str(role).lower()) or (close[0] if close else None)
    hint = f"; did you mean {name!r}?" if name else ""
    return [f"{where} has the unknown role {role!r}; expected one of {', '.join(ROLES)}{hint}"]


def _mixture(rows: Sequence[Row]) -> list[str]:
    """The problem of a file that holds text rows and others."""
    texts = [row for row in rows if row.kind == "text"]
    others = [row for row in rows if row.kind != "text"]
    if not texts or not others:
        return []
    text, other = texts[0], others[0]
    return [
        f"{text.source}: a text row in a file that also has {other.kind} rows ({other.source}); they are cut and "
        f"scored in different ways, so put the {len(texts):,} text rows into a file of their own"
    ]


def _nearest(value: Mapping[str, Any], expected: Sequence[str]) -> str:
    """A hint if one of the keys is nearly one of those expected."""
    for key in value:
        close = difflib.get_close_matches(key.lower(), expected, n=1, cutoff=0.75)
        if close and key not in expected:
            return f'; did you mean "{close[0]}" instead of "{key}"?'
    return ""


def _kind_of(value: object) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
