"""Plain text: each line that is not blank is a row with the key "text", as in the library `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reparam.core.text import not_utf8
from reparam.data.files.jsonl import LARGEST_LINE
from reparam.data.files.opened import opened
from reparam.errors import DataError


def read(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """The lines of a text (UTF-8, with or without a byte order mark), without the line breaks."""
    with opened(path) as file:
        offset = 0  # of the line's first byte
        for number, line in enumerate(iter(lambda: file.readline(LARGEST_LINE + 1), b""), start=1):
            where = f"{path}:{number}"
            if len(line) > LARGEST_LINE:
                raise DataError([f"{where}: a line of more than {LARGEST_LINE:,} bytes; each line of a text is a row"])
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield where, DataError([f"{where}: {not_utf8(error, offset)}"])
            else:
                if text.strip():
                    yield where, {"text": text}
            offset += len(line)
