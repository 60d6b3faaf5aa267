"""Read training rows: the objects of files (`data/files/`), in one of several formats (`data/formats/`).

A file may mix chats and completions, because both consist of a prompt and an answer that carries the loss. It cannot
mix them with text rows: all tokens of a text carry loss, long texts are split instead of truncated, and their score is
bits per byte, so scores of a mixed file would be meaningless.

All rows are checked, and all problems are reported together, each with its file and line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from reparam.data.files import objects
from reparam.data.formats import NAMES, read_row
from reparam.data.row import Row
from reparam.errors import DataError


def read_rows(source: str | Path, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Read all rows of a file, a glob, a folder, a data set, or standard input ("-").

    Files are JSONL, JSON lists, CSV, TSV, Parquet and Arrow, also compressed with gzip or zstd (UTF-8, with or without
    a byte order mark; blank lines are skipped). `columns` says under which key a key of a format is found, such as
    {"prompt": "question", "completion": "answer"}.

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
    rows: list[Row] = []
    problems: list[str] = []
    for place, value in objects(source):
        try:
            if isinstance(value, DataError):
                raise value
            rows.append(read_row(value, place, columns))
        except DataError as error:
            problems.extend(error.problems)
    problems.extend(_mixture(rows))
    if not rows and not problems:
        problems.append(f"{source}: the file is empty; expected objects with {NAMES}")
    if problems:
        raise DataError(problems)
    return rows


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
