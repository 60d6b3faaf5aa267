"""Read training rows: the objects of files (`data/files/`), in one of several formats (`data/formats/`).

A file may mix chats and completions, because both consist of a prompt and an answer that carries the loss. It cannot
mix them with text rows: all tokens of a text carry loss, long texts are split instead of truncated, and their score is
bits per byte, so scores of a mixed file would be meaningless.

All rows are checked, and all problems are reported together, each with its file and line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reparam.core.checks import listed
from reparam.core.text import counted
from reparam.data.files import objects, texts_of
from reparam.data.findings import BAD, MOST, THREE, BadRows
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
    return list(Reading([source], columns))


class Reading:
    """The rows of one or several sources, as a stream: `for row in Reading(["a.jsonl", "b.parquet"])`.

    `sources` and `columns` are those of `read_rows`. `most` limits the number of rows that are taken from each source:
    one number for all of them, or one for each. With `bad_rows="drop"`, rows that cannot be read are left out and
    counted; a file that cannot be read at all is an error nevertheless. With `streaming`, data sets on the hub are not
    downloaded as a whole.

    The stream raises DataError as `read_rows` does, at its end, with all problems. No row is given after the first one.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        columns: Mapping[str, str] | None = None,
        *,
        most: Sequence[int] = (),
        bad_rows: BadRows = "error",
        streaming: bool = False,
    ) -> None:
        self._sources, self._columns, self._bad_rows, self._streaming = sources, columns, bad_rows, streaming
        self._most = [*most] * len(sources) if len(most) == 1 else [*most]
        self.counts: list[int] = []
        """Number of rows of each source, after the stream has ended."""
        self._problems: list[str] = []
        self._first_with: dict[str, str] = {}  # a problem without its place -> the same of the first row that has it
        self._rows_with: Counter[str] = Counter()
        self._bad: list[str] = []
        self._bad_count = 0
        self._first: dict[str, str] = {}  # kind of rows -> source of the first one
        self._kinds: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Row]:
        for number, source in enumerate(self._sources):
            count, bad = 0, self._bad_count + len(self._problems)
            for row in self._rows(source):
                if not self._problems and not self._is_mixed():
                    yield row
                count += 1
                if self._most and count >= self._most[number]:
                    break
            self.counts.append(count)
            if not count and bad == self._bad_count + len(self._problems):
                self._problems.append(f"{source}: the file is empty; expected objects with {NAMES}")
        self._problems.extend(self._mixture())
        if not sum(self.counts) and not self._problems:
            self._problems.append(f"no rows are left: {self.notes()[0]}")
        if self._problems:
            raise DataError(self._told())

    def notes(self) -> tuple[str, ...]:
        """What was left out, as a sentence with the first three places, and which files were read line by line."""
        lines = [str(path) for source in self._sources for path in texts_of(source)]
        found = [f"each line of {listed(lines, shown=THREE)} is a text; for longer texts, write JSONL"] if lines else []
        if self._bad_count:
            more = ", ..." if self._bad_count > THREE else ""
            found.insert(0, f"{counted(self._bad_count, 'row')} {BAD}: {', '.join(self._bad)}{more}")
        return tuple(found)

    def row_of(self, value: Mapping[str, Any], place: str) -> Row:
        """The row that the object at a place ("file:line") holds. Raises DataError if it holds none."""
        return read_row(value, place, self._columns)

    def _rows(self, source: str | Path) -> Iterator[Row]:
        """The rows of one source. Records the problems of others."""
        for place, value in objects(source, streaming=self._streaming):
            try:
                if isinstance(value, DataError):
                    raise value
                row = self.row_of(value, place)
            except DataError as error:
                self._take(error, place)
            else:
                self._first.setdefault(row.kind, row.source)
                self._kinds[row.kind] += 1
                yield row

    def _take(self, error: DataError, place: str) -> None:
        if self._bad_rows == "drop":
            self._bad_count += 1
            if len(self._bad) < THREE:
                self._bad.append(error.problems[0])
            return
        for problem in error.problems:
            first = self._first_with.setdefault(problem.removeprefix(place), problem)
            self._rows_with[first] += 1
            if self._rows_with[first] == 1:
                self._problems.append(first)
        if self._rows_with.total() >= MOST:
            raise DataError([*self._told(), "and reading stopped there"])

    def _told(self) -> list[str]:
        """The problems. One that several rows have is told once, with the number of these rows."""
        more = {problem: counted(rows - 1, "more row") for problem, rows in self._rows_with.items() if rows > 1}
        return [f"{p} (and in {more[p]})" if p in more else p for p in self._problems]

    def _is_mixed(self) -> bool:
        return "text" in self._kinds and len(self._kinds) > 1

    def _mixture(self) -> list[str]:
        """The problem of a file that mixes text rows with other rows."""
        if not self._is_mixed():
            return []
        other = next(kind for kind in self._first if kind != "text")
        count = counted(self._kinds["text"], "text row")
        return [
            f"{self._first['text']}: a text row in a file that also has {other} rows ({self._first[other]}); the two "
            f"are truncated and scored differently, so move the {count} to a separate file"
        ]
