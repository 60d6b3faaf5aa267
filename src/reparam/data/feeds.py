"""One source of rows as a stream without end, which knows where it stands and can go on from there.

Rows are read when they are needed. At the end of the source the stream begins again: a *pass* is one time through it.
The files of a folder or a glob come in another order in each pass, unless only the first rows of the source are taken.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from reparam.data.files import files_of, hub, jsonl, reader
from reparam.errors import DataError

Object = tuple[str, "dict[str, Any] | DataError"]


class Feed(Iterator[Object]):
    """The objects of a source, one after another: pairs of a place ("file:line") and an object, or its error.

    `source` is a name as `data.files.objects` takes it, but for standard input. `most` is the number of objects that a
    pass takes. `seed` determines the order of the files.

    Raises DataError if there is no such source, and for a source without objects.
    """

    def __init__(self, source: str, *, seed: int = 0, most: int | None = None) -> None:
        self.source, self._seed, self._most = source, seed, most
        self.passes = 0
        """Number of passes that have been completed."""
        self._file = self._row = self._taken = 0
        folder = Path(source).is_dir() and hub.is_saved(Path(source))
        self._files = None if folder else files_of(source)
        self._objects: Iterator[Object] | None = None
        self._library: Any = None  # the data set of the library `datasets` that is being read
        self._begin: dict[str, Any] | None = None  # its state

    def __next__(self) -> Object:
        while True:
            if self._objects is None:
                self._objects = self._open()
            enough = self._most is not None and self._taken >= self._most
            found = None if enough else next(self._objects, None)
            if found is not None:
                self._row += 1
                self._taken += 1
                return found
            self._go_on(whole=enough)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as plain values."""
        own = {"passes": self.passes, "file": self._file, "row": self._row, "taken": self._taken}
        return {**own, "library": self._library.state_dict() if self._library is not None else self._begin}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where a stream of the same source stood."""
        self.passes, self._file, self._row, self._taken = (state[key] for key in ("passes", "file", "row", "taken"))
        self._begin, self._library, self._objects = state["library"], None, None

    def _go_on(self, *, whole: bool) -> None:
        """Go to the next file, or to the next pass."""
        self._file, self._row = self._file + 1, 0
        self._objects = self._library = self._begin = None
        if whole or self._file == len(self._files or (1,)):
            if not self._taken:
                raise DataError([f"{self.source}: there are no rows"])
            self.passes, self._file, self._taken = self.passes + 1, 0, 0

    def _open(self) -> Iterator[Object]:
        """The objects of the present file, from the place where the stream stands."""
        if self._files is not None:
            path = self._order()[self._file]
            if reader(path) is jsonl.read:
                return jsonl.read(path, skip=self._row)
            return islice(reader(path)(path), self._row, None)
        if Path(self.source).is_dir():
            return hub.read_folder(Path(self.source), skip=self._row)
        self._library = hub.streamed(self.source)
        if self._begin is not None:
            self._library.load_state_dict(self._begin)
        return hub.numbered(self._library, self.source, self._row + 1)

    def _order(self) -> list[Path]:
        files = list(self._files or ())
        if self._most is None:
            random.Random(f"{self._seed} {self.passes}").shuffle(files)
        return files
