"""JSON: one object per line (JSONL), or one list of objects. Errors name the file, the line and the column."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from reparam.core.strict_json import loads
from reparam.core.text import UTF_16, not_utf8
from reparam.data.files.opened import opened
from reparam.data.messages import kind_of
from reparam.errors import DataError, DuplicateKey

LARGEST_LINE = 2**26  # bytes
KEPT = 2**26  # bytes of standard input that are kept in memory; more go into a temporary file
LARGEST_LIST = 2**30  # bytes of a list of objects, which is parsed as a whole

_copies: dict[Any, IO[bytes]] = {}  # of standard input


def read(path: Path, skip: int = 0) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """The objects of a JSONL file (UTF-8, with or without a byte order mark); blank lines are skipped.

    The first `skip` objects are left out, and are not parsed.
    """
    with opened(path) as file:
        yield from _lines(file, str(path), skip)


def read_standard_input() -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """The objects of JSONL on standard input, which is copied when it is first read: rows may be read twice."""
    if sys.stdin not in _copies:
        _copies.clear()
        _copies[sys.stdin] = tempfile.SpooledTemporaryFile(KEPT)  # noqa: SIM115  (it disappears with the process)
        shutil.copyfileobj(sys.stdin.buffer, _copies[sys.stdin])
    copy = _copies[sys.stdin]
    copy.seek(0)
    yield from _lines(copy, "standard input")


def read_json(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """The objects of a file with one list of objects, or of a JSONL file under the suffix .json."""
    if not path.is_file():  # it is read twice
        raise DataError([f"{path}: not a regular file; a pipe can hold JSONL"])
    with opened(path) as file:
        start = file.read(2**16).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if start != b"[":
        yield from read(path)
        return
    with opened(path) as file:
        content = bytearray()
        while len(content) <= LARGEST_LIST and (part := file.read(2**20)):  # one read would take memory for all of it
            content += part
    if len(content) > LARGEST_LIST:
        raise DataError([f"{path}: a list of more than {LARGEST_LIST:,} bytes; write one object per line (JSONL)"])
    values = _parsed(bytes(content), path)
    for number, value in enumerate(values, start=1):
        where = f"{path}:row {number}"
        yield where, value if isinstance(value, dict) else _not_an_object(where, value)


def _parsed(content: bytes, path: Path) -> list[Any]:
    try:
        values: list[Any] = loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError([f"{path}:{error.lineno}:{error.colno}: malformed JSON: {error.msg}"]) from None
    except UnicodeDecodeError as error:
        raise DataError([f"{path}: {not_utf8(error)}"]) from None
    except DuplicateKey as error:
        raise DataError([f"{path}: {error}"]) from None
    except ValueError as error:
        raise DataError([f"{path}: malformed JSON: {error}"]) from None
    return values


def _lines(file: IO[bytes], name: str, skip: int = 0) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    offset = 0  # of the line's first byte
    value: dict[str, Any] | DataError | None
    lines = iter(lambda: file.readline(LARGEST_LINE + 1), b"")
    for number, line in enumerate(lines, start=1):
        where = f"{name}:{number}"
        if len(line) > LARGEST_LINE:
            raise DataError([f"{where}: a line of more than {LARGEST_LINE:,} bytes; JSONL has one object per line"])
        if skip and line.startswith(b"{"):  # surely not a blank line
            skip, offset = skip - 1, offset + len(line)
            continue
        try:
            value = _parse(line.removesuffix(b"\n"), where, offset=offset, first=number == 1)
        except DataError as error:
            if number == 1 and line.startswith(UTF_16):
                raise
            value = error
        if value is not None and not skip:
            yield where, value
        skip -= value is not None and skip > 0
        offset += len(line)


def _parse(line: bytes, where: str, *, offset: int, first: bool) -> dict[str, Any] | None:
    """The object on a line, or None for a blank line. `offset` is the position of the line's first byte in the file."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise DataError([f"{where}: {not_utf8(error, offset)}"]) from None
    if first:
        text = text.removeprefix("\ufeff")  # byte order mark
    if not text.strip():
        return None
    try:
        value = loads(text)
    except json.JSONDecodeError as error:
        hint = "; JSONL has one complete object per line" if first and text.strip() in ("[", "{", "[{") else ""
        raise DataError([f"{where}:{error.colno}: malformed JSON: {error.msg}{hint}"]) from None
    except DuplicateKey as error:
        raise DataError([f"{where}: {error}"]) from None
    except ValueError as error:  # an integer with too many digits; brackets nested too deeply
        raise DataError([f"{where}: malformed JSON: {error}"]) from None
    if not isinstance(value, dict):
        raise _not_an_object(where, value)
    return value


def _not_an_object(where: str, value: object) -> DataError:
    return DataError([f"{where}: expected an object, got {kind_of(value)}"])
