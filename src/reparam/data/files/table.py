"""CSV and TSV with a header line. Errors name the file and the line on which the row ends."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from reparam.core.text import not_utf8
from reparam.data.files.opened import opened
from reparam.errors import DataError

LONGEST = 2**27  # characters of a field


def read(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """The rows of a table as objects of strings. The suffix .tsv means that tabs separate the fields."""
    csv.field_size_limit(LONGEST)
    delimiter = "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","
    with opened(path) as file:
        lines = csv.reader(_decoded(file, path), delimiter=delimiter, strict=True)
        try:
            header = next(lines, [])
            if len(set(header)) < len(header):
                raise DataError([f"{path}:1: two columns of the header have the same name"])
            if len(header) == 1 and (other := next((c for c in ";\t|" if c in header[0]), None)):
                wanted = "tabs" if delimiter == "\t" else "commas"
                hint = f"the header has one column, with {other!r} in its name; separate the fields by {wanted}"
                raise DataError([f"{path}:1: {hint}"])
            for fields in lines:
                where = f"{path}:{lines.line_num}"
                if not fields:
                    continue
                if len(fields) != len(header):
                    yield where, DataError([f"{where}: {len(fields)} fields, and the header has {len(header)}"])
                else:
                    yield where, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise DataError([f"{path}:{lines.line_num}: malformed table: {error}"]) from None


def _decoded(file: IO[bytes], path: Path) -> Iterator[str]:
    offset = 0  # of the line's first byte
    for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b"")):
        if len(line) > LONGEST:
            raise DataError([f"{path}:{number + 1}: a line of more than {LONGEST:,} bytes"])
        try:
            text = line.decode("utf-8" if number else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError([f"{path}:{number + 1}: {not_utf8(error, offset)}"]) from None
        yield text
        offset += len(line)
