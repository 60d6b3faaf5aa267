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

import contextlib
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reparam.data.messages import checked_messages, kind_of, near_key, string_problem
from reparam.errors import DataError

RowKind = Literal["chat", "completion", "text"]

KEYS = ("messages", "prompt", "completion", "text")
MEDIA = ("images", "image", "audio", "audios", "video", "videos")
RESERVED = {"messages", "add_generation_prompt"}
FORMATS = '"messages", or "prompt" and "completion", or "text"'


@dataclass(frozen=True, slots=True)
class Row:
    """A training row. `kind` determines which fields hold its content."""

    kind: RowKind
    source: str
    """Where the row comes from, as "file:line"."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """Messages of a chat: dictionaries with a "role", a "content" and any other keys of the file."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, such as `tools`: from the row's keys "tools", "documents" and
    "chat_template_kwargs"."""
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
        raise DataError([f"{source}: expected an object with {FORMATS}, got {kind_of(value)}"])
    return value


def _row(value: dict[str, Any], source: str) -> Row:
    """Convert a JSON object to a row. Raises DataError with all its problems."""
    present = [key for key in KEYS if key in value]
    columns = {k: v for k, v in value.items() if k not in KEYS}
    if found := [f'"{key}"' for key in MEDIA if value.get(key)]:
        raise DataError([f"{source}: {found[0]}: only text is supported; remove the key from the row"])
    match present:
        case ["messages"]:
            return _chat(value["messages"], columns, source)
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
            raise DataError([f'{source}: "{present[0]}" without "{other}"{near_key(value, [other])}'])
        case []:
            has = ", ".join(f'"{k}"' for k in list(value)[:6]) or "no keys"
            raise DataError([f"{source}: expected {FORMATS}; the row has {has}{near_key(value, KEYS)}"])
        case _:
            keys = ", ".join(f'"{k}"' for k in present)
            raise DataError([f"{source}: several formats in one row ({keys}); keep one of {FORMATS}"])


def _chat(messages: object, columns: dict[str, Any], source: str) -> Row:
    """A chat row. The keys that the chat template reads are taken out of the columns."""
    variables = _variables(columns, source)
    system = columns.pop("system", None)
    if system is not None and isinstance(messages, list):
        if problem := string_problem(system, f'{source}: "system"'):
            raise DataError([problem])
        if any(isinstance(message, dict) and message.get("role") == "system" for message in messages):
            raise DataError([f'{source}: has "system" and a message with this role; keep one of them'])
        messages = [{"role": "system", "content": system}, *messages]
    return Row("chat", source, messages=checked_messages(messages, source), variables=variables, columns=columns)


def _variables(columns: dict[str, Any], source: str) -> dict[str, Any]:
    """The variables of the chat template, taken out of the columns."""
    found: dict[str, Any] = {}
    for key in ("chat_template_kwargs", "tools", "documents"):
        value = columns.pop(key, None)
        if isinstance(value, str):  # tables hold them as JSON in a string
            with contextlib.suppress(ValueError):
                value = json.loads(value) if value.strip() else None
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


def _strings(value: dict[str, Any], keys: Sequence[str], source: str) -> None:
    """Raise DataError unless these keys hold strings that UTF-8 can encode."""
    problems = [problem for key in keys if (problem := string_problem(value[key], f'{source}: "{key}"'))]
    if problems:
        raise DataError(problems)


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
