"""Read training rows from a JSONL file: one JSON object per line, in one of three formats.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}     chat
    {"prompt": "...", "completion": "..."}                                                          completion
    {"text": "..."}                                                                                 text

`Row.columns` holds all other keys, such as a task. A file may mix chats and completions, because both consist of a
prompt and an answer that carries the loss. It cannot mix them with text rows: all tokens of a text carry loss, long
texts are split instead of truncated, and their score is bits per byte, so scores of a mixed file would be meaningless.

All rows are checked, and all problems are reported together, each with its file and line.
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
    """A training row. `kind` determines which fields hold its content."""

    kind: RowKind
    source: str
    """Where the row comes from, as "file:line"."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """Messages of a chat: dictionaries with a "role", a "content" and any other keys of the file."""
    prompt: str = ""
    """Prompt of a completion row."""
    completion: str = ""
    """Answer of a completion row."""
    text: str = ""
    """Content of a text row."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """All other keys of the JSON object."""


def read_rows(path: str | Path) -> list[Row]:
    """Read all rows of a JSONL file (UTF-8, with or without a byte order mark; blank lines are skipped).

    Raises DataError if the file does not exist or is empty, for bytes that are not UTF-8, for malformed JSON (with line
    and column), for a row that is not an object, matches none or several of the formats, or has a wrong type, an
    unknown role or no content, and for a file that mixes text rows with other rows.

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
        problems.append(f"{path}: the file is empty; expected one JSON object per line with {FORMATS}")
    if problems:
        raise DataError(problems)
    return rows


def _content(path: Path) -> bytes:
    """The bytes of the file. If it does not exist, raises DataError that names similar files."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        message = f"{path}: no such file"
        if not path.parent.is_dir():
            raise DataError([f"{message}; its folder {path.parent} does not exist"]) from None
        names = sorted(p.name for p in path.parent.iterdir() if p.is_file())
        near = difflib.get_close_matches(path.name, names, cutoff=0.5) or [n for n in names if n.endswith(".jsonl")][:3]
        hint = f"; that folder contains {', '.join(near)}" if near else ""
        raise DataError([message + hint]) from None
    except IsADirectoryError:
        raise DataError([f"{path}: is a folder; name a JSONL file in it"]) from None
    except OSError as error:
        raise DataError([f"{path}: cannot be read: {error.strerror}"]) from error


def _parse(line: bytes, source: str, *, offset: int, first: bool) -> dict[str, Any] | None:
    """The object on a line, or None for a blank line. `offset` is the position of the line's first byte in the file."""
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
        hint = "; JSONL has one complete object per line" if first and text.strip() in ("[", "{", "[{") else ""
        raise DataError([f"{source}:{error.colno}: malformed JSON: {error.msg}{hint}"]) from None
    except (ValueError, RecursionError) as error:  # an integer with too many digits; brackets nested too deeply
        raise DataError([f"{source}: malformed JSON: {error}"]) from None
    if not isinstance(value, dict):
        raise DataError([f"{source}: expected an object with {FORMATS}, got {_kind_of(value)}"])
    return value


def _row(value: dict[str, Any], source: str) -> Row:
    """Convert a JSON object to a row. Raises DataError with all its problems."""
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
    """Raise DataError unless these keys hold strings that UTF-8 can encode."""
    problems = [problem for key in keys if (problem := _string_problem(value[key], f'{source}: "{key}"'))]
    if problems:
        raise DataError(problems)


def _string_problem(value: object, where: str) -> str | None:
    if not isinstance(value, str):
        return f"{where} must be a string, got {_kind_of(value)}"
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, which no tokenizer accepts
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
    """The problem of a file that mixes text rows with other rows."""
    texts = [row for row in rows if row.kind == "text"]
    others = [row for row in rows if row.kind != "text"]
    if not texts or not others:
        return []
    text, other = texts[0], others[0]
    return [
        f"{text.source}: a text row in a file that also has {other.kind} rows ({other.source}); the two are truncated "
        f"and scored differently, so move the {len(texts):,} text rows to a separate file"
    ]


def _nearest(value: Mapping[str, Any], expected: Sequence[str]) -> str:
    """A hint if a key resembles an expected one; otherwise ""."""
    for key in value:
        close = difflib.get_close_matches(key.lower(), expected, n=1, cutoff=0.75)
        if close and key not in expected:
            return f'; did you mean "{close[0]}" instead of "{key}"?'
    return ""


def _kind_of(value: object) -> str:
    """The JSON name of a value's type, with an article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
