"""Figures about a set of rows: what they hold, how long they are, what `max_length` cuts, and which rows repeat others.

All functions are pure: they get rows and encoded rows, and return plain values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reparam.data.batches import Encoded
from reparam.data.forms import reasoning_of
from reparam.data.messages import learned
from reparam.data.row import Row

ROUNDED = 8  # a recommended length is a multiple of this, which suits tensor cores
KEPT = 0.99  # share of the rows that a recommended length keeps whole, if keeping all would take twice as much
BINS = 12  # of a histogram


@dataclasses.dataclass(frozen=True)
class Contents:
    """What rows hold. All but `rows`, `chats`, `completions` and `texts` is about the chats."""

    rows: int
    chats: int
    completions: int
    texts: int
    messages: tuple[int, int]
    """The smallest and the largest number of messages of a chat; (0, 0) without chats."""
    roles: dict[str, int]
    """Number of messages by role."""
    with_tools: int
    """Number of chats with the variable `tools`."""
    tool_calls: int
    """Number of tool calls."""
    with_reasoning: int
    """Number of answers with reasoning in a key of its own."""
    excluded: int
    """Number of answers that a flag, such as `train: false`, excludes from the loss."""


@dataclasses.dataclass(frozen=True)
class Bin:
    """One bar of a histogram: the number of rows with `shortest` to `longest` tokens."""

    shortest: int
    longest: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of rows in tokens, before anything is cut. A chat that becomes several examples counts several times."""

    shortest: int
    mean: float
    median: int
    p95: int
    p99: int
    longest: int
    histogram: tuple[Bin, ...]


@dataclasses.dataclass(frozen=True)
class Cut:
    """What `max_length` does to the rows that are longer. Counts are of rows; `first` names up to three of them."""

    max_length: int
    longer: int
    """Rows with more tokens; texts among them are split, and lose nothing."""
    share: float
    """`longer` as a share of all rows, 0 ... 1."""
    lose_loss: int
    """Chats and completions that lose tokens with loss."""
    lose_answer: int
    """Chats and completions that lose all of them, which training refuses."""
    first: tuple[str, ...]


class Pair(NamedTuple):
    """A row, and the earlier row (or the row of the other file) that it repeats: both as "file:line"."""

    row: str
    same_as: str


def contents(rows: Sequence[Row]) -> Contents:
    """Count what the rows hold.

    >>> found = contents([Row("completion", "a:1", prompt="2 + 2 =", completion=" 4"), Row("completion", "a:2")])
    >>> found.rows, found.completions, found.messages
    (2, 2, (0, 0))
    """
    kinds = Counter(row.kind for row in rows)
    chats = [row for row in rows if row.kind == "chat"]
    messages = [message for row in chats for message in row.messages]
    sizes = [len(row.messages) for row in chats] or [0]
    answers = [message for message in messages if message["role"] == "assistant"]
    return Contents(
        rows=len(rows),
        chats=kinds["chat"],
        completions=kinds["completion"],
        texts=kinds["text"],
        messages=(min(sizes), max(sizes)),
        roles=dict(Counter(str(message["role"]) for message in messages)),
        with_tools=sum(1 for row in chats if row.variables.get("tools")),
        tool_calls=sum(len(message.get("tool_calls") or ()) for message in answers),
        with_reasoning=sum(1 for message in answers if reasoning_of(message)),
        excluded=sum(1 for message in answers if not learned(message)),
    )


def lengths(encoded: Encoded) -> Lengths:
    """The lengths of examples that were encoded without a limit."""
    found = encoded.starts.diff()
    ordered = found.sort().values

    def share(part: float) -> int:
        return int(ordered[min(len(ordered) - 1, int(part * len(ordered)))])

    return Lengths(
        shortest=int(ordered[0]),
        mean=float(found.double().mean()),
        median=share(0.5),
        p95=share(0.95),
        p99=share(0.99),
        longest=int(ordered[-1]),
        histogram=_histogram(ordered),
    )


def cut(encoded: Encoded, max_length: int) -> Cut:
    """What `max_length` tokens would do to examples that were encoded without a limit."""
    sizes = encoded.starts.diff()
    longer = sizes > max_length
    texts = encoded.text_bytes > 0
    first, last = _span_of_loss(encoded)
    losing = ~texts & (last >= max_length)
    lost = ~texts & (first >= max_length)

    def names(chosen: Tensor) -> list[str]:
        return list(dict.fromkeys(encoded.sources[i] for i in chosen.nonzero().flatten().tolist()))

    over = names(longer)
    return Cut(
        max_length=max_length,
        longer=len(over),
        share=len(over) / max(1, len(set(encoded.sources))),
        lose_loss=len(names(losing)),
        lose_answer=len(names(lost)),
        first=tuple(over[:3]),
    )


def recommended(found: Lengths, *, context: int | None) -> int:
    """A maximum length in tokens: all rows whole if that is not wasteful, else 99 % of them.

    Keeping all is wasteful if the longest row has more than twice the tokens of the 99th percentile. The result is a
    multiple of 8, and at most the `context` length of the model, if that is known.

    >>> recommended(Lengths(5, 20.0, 20, 30, 40, 70, ()), context=None)
    72
    >>> recommended(Lengths(5, 20.0, 20, 30, 40, 900, ()), context=None)
    40
    """
    wanted = found.longest if found.longest <= 2 * found.p99 else found.p99
    rounded = -(-wanted // ROUNDED) * ROUNDED
    return rounded if context is None else min(rounded, context)


def repeats(rows: Sequence[Row]) -> list[Pair]:
    """The rows with the same content as an earlier one; white space is not compared.

    >>> a, b = (Row("text", f"a:{n}", text=text) for n, text in ((1, "x  y"), (2, "x y")))
    >>> repeats([a, b])
    [Pair(row='a:2', same_as='a:1')]
    """
    seen: dict[bytes, str] = {}
    found = []
    for row in rows:
        key = _digest(_content(row))
        if key in seen:
            found.append(Pair(row.source, seen[key]))
        else:
            seen[key] = row.source
    return found


def shared(rows: Sequence[Row], held_out: Sequence[Row]) -> tuple[list[Pair], list[Pair]]:
    """The rows that also stand in the held-out rows: with the same content, and with the same question alone."""
    whole = {_digest(_content(row)): row.source for row in reversed(held_out)}
    asked = {_digest(question): row.source for row in reversed(held_out) if (question := _question(row))}
    same, alike = [], []
    for row in rows:
        question = _question(row)
        if (source := whole.get(_digest(_content(row)))) is not None:
            same.append(Pair(row.source, source))
        elif question and (source := asked.get(_digest(question))) is not None:
            alike.append(Pair(row.source, source))
    return same, alike


def _histogram(ordered: Tensor) -> tuple[Bin, ...]:
    """Bars of equal width up to the 99th percentile, and one for what is longer."""
    low, high = int(ordered[0]), int(ordered[min(len(ordered) - 1, int(KEPT * len(ordered)))])
    width = max(1, -(-(high - low + 1) // BINS))
    edges = [*range(low, high + 1, width)]
    edges.append(edges[-1] + width)
    counts = torch.searchsorted(ordered, torch.tensor(edges)).tolist()
    bars = [
        Bin(start, stop - 1, after - before)
        for start, stop, before, after in zip(edges, edges[1:], counts, counts[1:], strict=False)
    ]
    beyond = len(ordered) - counts[-1]
    return (*bars, *([Bin(edges[-1], int(ordered[-1]), beyond)] if beyond else []))


def _span_of_loss(encoded: Encoded) -> tuple[Tensor, Tensor]:
    """The positions of the first and of the last token with loss in each example, both [E]; each example has one."""
    places = encoded.loss.nonzero().flatten()
    first = places[torch.searchsorted(places, encoded.starts[:-1])]
    last = places[torch.searchsorted(places, encoded.starts[1:]) - 1]
    return first - encoded.starts[:-1], last - encoded.starts[:-1]


def _content(row: Row) -> Iterator[object]:
    yield row.kind
    yield from _question(row) or ()
    yield "answer"
    if row.kind == "chat":
        yield from _parts(row, _last_answer(row), len(row.messages))
    else:
        yield _squeezed(row.completion or row.text)


def _question(row: Row) -> tuple[object, ...]:
    """What stands before the last answer; () for a text."""
    match row.kind:
        case "chat":
            return tuple(_parts(row, 0, _last_answer(row)))
        case "completion":
            return (_squeezed(row.prompt),)
        case _:
            return ()


def _last_answer(row: Row) -> int:
    """Index of the last answer of a chat; the number of messages if there is none."""
    roles = [message["role"] for message in row.messages]
    return len(roles) - 1 - roles[::-1].index("assistant") if "assistant" in roles else len(roles)


def _parts(row: Row, start: int, end: int) -> Iterator[object]:
    for message in row.messages[start:end]:
        yield [message["role"], _squeezed(message["content"]), message.get("tool_calls"), reasoning_of(message)]


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _digest(parts: object) -> bytes:
    values = list(parts) if not isinstance(parts, list) else parts  # type: ignore[call-overload]
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).digest()
