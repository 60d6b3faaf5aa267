"""A data set that is read, encoded and shuffled while it is trained on, and that can go on where it stopped.

    feeds -> rows -> encoded examples -> the shuffle buffer -> [packs] -> items

An item is one example, or a pack of several. Items are numbered from 0, and asked for in this order: so a sequential
sampler serves as for any other data set, and skipping to the place of a resumed run reads nothing. The state after item
n holds the places of the feeds, everything that has been read but not been given, and the random generator. Hence the
items after n are the same, whether the stream was stopped there or not.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from reparam.core.text import counted
from reparam.data.corpus import Places
from reparam.data.encode import CHARACTERS, with_template
from reparam.data.encoder import Encoder, Settings
from reparam.data.feeds import Feed
from reparam.data.findings import BAD, THREE, Findings
from reparam.data.formats import read_row
from reparam.data.framing import Frame
from reparam.data.packing import best_fit
from reparam.data.row import Row
from reparam.data.stream_examples import Example, flat, tensors, unflat
from reparam.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reparam.data.chat import LossOn
    from reparam.data.findings import BadRows
    from reparam.data.lengths import TooLong

CHUNK = 256  # rows that are encoded together
BEHIND = 64  # items that are kept after they were given, beside those that the caller asks for

Item = list[Example]


@dataclass(frozen=True)
class How:
    """How a stream encodes its rows; the names are those of the configuration."""

    max_length: int
    loss_on: LossOn = "answers"
    too_long: TooLong = "auto"
    bad_rows: BadRows = "error"
    packing: bool = False
    buffer: int = 1000
    """Number of examples among which the next one is drawn."""
    seed: int = 0


class Streamed(Dataset[dict[str, Tensor]]):
    """The items of a stream, by number; item n must be asked for after item n - 1 or later.

    `streamed[n]` is what `Encoded` gives for one example, or `Packed` for a pack. `row` has numbers of examples for
    `names`. With several feeds, `weights` are their shares. Rows at the places `held` are left out.

    `length` is the number of items that the run takes, and `behind` the number of items before the last one that are
    kept, because the caller may ask for batches ahead of its checkpoints.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        tokenizer: PreTrainedTokenizerBase,
        how: How,
        *,
        length: int,
        behind: int,
        weights: Sequence[float] = (),
        columns: Mapping[str, str] | None = None,
        frame: Frame | None = None,
        held: Iterable[str] = (),
    ) -> None:
        self._feeds, self._tokenizer, self._how = feeds, tokenizer, how
        self._weights = weights or [1.0] * len(feeds)
        self._columns, self._frame, self._held = columns, frame or Frame(), frozenset(held)
        self._length = length
        self._findings = Findings(tokenizer, max_length=how.max_length, vocab_size=None)
        settings = Settings(how.max_length, how.loss_on, None, how.too_long, how.bad_rows, lenient=True)
        self._encode = Encoder(tokenizer, settings)
        self._draw = random.Random(how.seed)
        self._ready: deque[Example] = deque()  # encoded, not in the buffer yet
        self._buffer: list[Example] = []
        self._packs: list[Item] = []  # packed, not given yet
        self._given: deque[tuple[int, Item]] = deque(maxlen=behind + BEHIND)  # (number of the first example, item)
        self._items = self._examples = 0  # numbers of the next ones
        self._counts: Counter[str] = Counter()  # rows that were read, and those that were cut or left out, by what
        self._first: dict[str, list[str]] = {}  # the first places of each
        self._kinds: set[str] = set()
        self._fruitless = 0  # passes that had been completed at the last useful row

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(f"item {index} of {self._length}")
        while self._items <= index:
            self._give()
        first, item = self._given[index - self._items]
        found = [tensors(example, first + number) for number, example in enumerate(item)]
        if not self._how.packing:
            return found[0]
        joined = {key: torch.cat([part[key] for part in found]) for key in ("input_ids", "labels")}
        places = torch.cat([torch.arange(len(part["input_ids"])) for part in found])
        return {**joined, "position_ids": places, "row": torch.stack([part["row"] for part in found])}

    def names(self, example: int) -> str:
        """Where an example of the last items comes from, as "file:line"."""
        found = (item[example - first].source for first, item in self._given if 0 <= example - first < len(item))
        return next(found, f"example {example}")

    def check_vocabulary(self, size: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Let the stream refuse rows with token ids of at least `size`."""
        self._findings.vocab_size = size
        self._encode.how = self._encode.how._replace(vocab_size=size)

    def notes(self) -> list[str]:
        """What has been read, and what was cut or left out of it, in sentences."""
        last = self._given[-1][1][-1].passes if self._given else 0
        again = f", in {counted(last + 1, 'pass', 'passes')} through them" if last else ""
        found = [f"{counted(self._examples, 'example')} came from the {self._counts['row']:,} rows read so far{again}"]
        for what, count in self._counts.items():
            places, more = ", ".join(self._first.get(what, ())), ", ..." if count > THREE else ""
            if what == BAD:
                found.append(f"{counted(count, 'row')} {what}: {places}{more}")
            elif what != "row":
                found.append(f"{what} ({counted(count, 'row')}: {places}{more})")
        return found

    # ---- the state

    def state(self, items: int) -> dict[str, Any]:
        """The state after this number of items: plain values and tensors. At most `behind` items back."""
        while self._items < items:
            self._give()
        ahead = [item for _, item in islice(self._given, len(self._given) - (self._items - items), None)]
        pending = [*ahead, *self._packs]
        return {
            "feeds": [feed.state() for feed in self._feeds],
            "draw": list(self._draw.getstate()),
            "sizes": [len(item) for item in pending],
            "buffered": len(self._buffer),
            "held": flat([*(example for item in pending for example in item), *self._buffer, *self._ready]),
            "numbers": [items, self._examples - sum(map(len, ahead))],
            "counts": dict(self._counts),
            "first": self._first,
            "kinds": sorted(self._kinds),
            "fruitless": self._fruitless,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after a state of a stream with the same settings."""
        for feed, own in zip(self._feeds, state["feeds"], strict=True):
            feed.restore(own)
        version, internal, normal = state["draw"]
        self._draw.setstate((version, tuple(internal), normal))
        held = iter(unflat(state["held"]))
        self._packs = [list(islice(held, size)) for size in state["sizes"]]
        self._buffer = list(islice(held, state["buffered"]))
        self._ready = deque(held)
        self._given.clear()
        self._items, self._examples = state["numbers"]
        self._counts, self._first = Counter(state["counts"]), dict(state["first"])
        self._kinds, self._fruitless = set(state["kinds"]), state["fruitless"]

    # ---- the stream

    def _give(self) -> None:
        """Add the next item to those that were given."""
        if not self._packs:
            self._packs = self._packed() if self._how.packing else [[self._shuffled()]]
        item = self._packs.pop(0)
        self._given.append((self._examples, item))
        self._items, self._examples = self._items + 1, self._examples + len(item)

    def _packed(self) -> list[Item]:
        """The next examples of one pass, as many as the buffer has, in packs."""
        group = [self._shuffled()]
        while len(group) < self._how.buffer and self._next_pass() == group[0].passes:
            group.append(self._shuffled())
        packs = best_fit([len(example.ids) for example in group], self._how.max_length)
        self._draw.shuffle(packs)
        return [[group[number] for number in pack] for pack in packs]

    def _shuffled(self) -> Example:
        """One of the examples in the buffer; all of a pass leave it before the next pass begins."""
        current = self._next_pass()
        while len(self._buffer) < self._how.buffer and self._fill()[0].passes == current:
            self._buffer.append(self._ready.popleft())
        at = self._draw.randrange(len(self._buffer))
        self._buffer[at], self._buffer[-1] = self._buffer[-1], self._buffer[at]
        return self._buffer.pop()

    def _next_pass(self) -> int:
        """The pass of the next example."""
        return self._buffer[0].passes if self._buffer else self._fill()[0].passes

    def _fill(self) -> deque[Example]:
        """The encoded examples, at least one."""
        while not self._ready:
            rows = self._rows()
            self._ready.extend(self._encoded(rows))
            if self._ready:
                self._fruitless = sum(feed.passes for feed in self._feeds)
        return self._ready

    def _rows(self) -> list[tuple[Row, int]]:
        """The next rows, and the pass of each."""
        rows: list[tuple[Row, int]] = []
        characters = 0
        while len(rows) < CHUNK and characters < CHARACTERS:
            if sum(feed.passes for feed in self._feeds) > self._fruitless + len(self._feeds):
                if rows:
                    break
                raise DataError([f"no rows are left: {'; '.join(self.notes())}"])
            (feed,) = self._draw.choices(self._feeds, self._weights) if len(self._feeds) > 1 else self._feeds
            place, value = next(feed)
            if place in self._held:
                continue
            self._counts["row"] += 1
            try:
                if isinstance(value, DataError):
                    raise value
                row = read_row(value, place, self._columns)
            except DataError as error:
                if self._how.bad_rows != "drop":
                    raise self._told(error) from None
                self._note(BAD, error.problems[0])
                continue
            self._check_kind(row)
            rows.append((row, feed.passes if len(self._feeds) == 1 else 0))
            characters += row.characters
        return rows

    def _check_kind(self, row: Row) -> None:
        self._kinds.add(row.kind)
        if "text" in self._kinds and len(self._kinds) > 1:
            others = "other rows are texts" if row.kind != "text" else "other rows are not"
            raise self._told(
                DataError([f"{row.source}: a {row.kind} row, and {others}; the two are cut and scored differently"])
            )

    def _encoded(self, rows: Sequence[tuple[Row, int]]) -> list[Example]:
        """The examples of rows."""
        framed = list(with_template(self._frame.rows(row for row, _ in rows), self._tokenizer))
        try:
            made = self._encode(framed)
            self._findings.add(made.found, 0)
            self._findings.raise_problems()
        except DataError as error:
            raise self._told(error) from None
        self._note_findings(framed)
        of = made.arrays.of
        places = Places(made.arrays.names, of["file"], of["line"])
        ends = np.cumsum(of["lengths"])
        return [
            Example(of["ids"][end - length : end], of["loss"][end - length : end], places[row], rows[row][1])
            for end, length, row in zip(ends, of["lengths"], of["row"].tolist(), strict=True)
        ]

    def _note_findings(self, rows: Sequence[Row]) -> None:
        for what, numbers in self._findings.marks.items():
            for number in numbers:
                self._note(what, f"{rows[number].source}{f': {why}' if (why := self._why(what, number)) else ''}")
        self._findings.clear()

    def _why(self, what: str, number: int) -> str:
        return self._findings.reasons.get(number, "") if what == BAD else ""

    def _note(self, what: str, place: str) -> None:
        self._counts[what] += 1
        if len(places := self._first.setdefault(what, [])) < THREE:
            places.append(place)

    def _told(self, error: DataError) -> DataError:
        """The error, with what to do about a row that is met during a run."""
        return DataError(
            [*error.problems, "the run can go on after its newest checkpoint without such rows: --data.bad_rows drop"]
        )
