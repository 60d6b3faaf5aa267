"""Figures about a set of rows: what they hold, how long they are, what `max_length` cuts, and which rows repeat others.

All functions are pure: they get rows and encoded rows, and return plain values. R is the number of rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reparam.data.corpus import CUT, DROPPED, Corpus
from reparam.data.forms import reasoning_of
from reparam.data.messages import learned
from reparam.data.row import Row

ROUNDED = 8  # a recommended length is a multiple of this, which suits tensor cores
KEPT = 0.99  # share of the rows that a recommended length keeps whole, if keeping all would take twice as much
BINS = 12  # of a histogram
SIZE = 16  # bytes of a digest


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


class Trait(NamedTuple):
    """What is kept of a row to find rows that repeat it: its place, and digests of its content and of its question."""

    source: str
    content: bytes
    question: bytes | None
    """None for a row without a question, such as a text."""


def survey(rows: Iterable[Row]) -> tuple[Contents, list[Trait]]:
    """Count what the rows hold, and digest them, one after the other.

    >>> found, traits = survey([Row("completion", "a:1", prompt="2 + 2 =", completion=" 4")])
    >>> found.rows, found.completions, found.messages, traits[0].source
    (1, 1, (0, 0), 'a:1')
    """
    kinds: Counter[str] = Counter()
    roles: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    sizes: list[int] = []
    traits = []
    for row in rows:
        question = _question(row)
        asked, answered = _digest(question) if question else None, _digest(_answer(row))
        traits.append(Trait(row.source, hashlib.blake2b((asked or b"") + answered, digest_size=SIZE).digest(), asked))
        kinds[row.kind] += 1
        if row.kind != "chat":
            continue
        sizes = [min([*sizes[:1], len(row.messages)]), max([*sizes[1:], len(row.messages)])]
        roles.update(str(message["role"]) for message in row.messages)
        answers = [message for message in row.messages if message["role"] == "assistant"]
        counts["with_tools"] += bool(row.variables.get("tools"))
        counts["tool_calls"] += sum(len(message.get("tool_calls") or ()) for message in answers)
        counts["with_reasoning"] += sum(1 for message in answers if reasoning_of(message))
        counts["excluded"] += sum(1 for message in answers if not learned(message))
    found = Contents(
        rows=len(traits),
        chats=kinds["chat"],
        completions=kinds["completion"],
        texts=kinds["text"],
        messages=(sizes[0], sizes[1]) if sizes else (0, 0),
        roles=dict(roles),
        **{name: counts[name] for name in ("with_tools", "tool_calls", "with_reasoning", "excluded")},
    )
    return found, traits


def lengths(sizes: Tensor) -> Lengths:
    """The figures of the numbers of tokens of rows, [R] with R at least 1."""
    ordered = sizes.sort().values

    def share(part: float) -> int:
        return int(ordered[min(len(ordered) - 1, int(part * len(ordered)))])

    return Lengths(
        shortest=int(ordered[0]),
        mean=float(sizes.double().mean()),
        median=share(0.5),
        p95=share(0.95),
        p99=share(0.99),
        longest=int(ordered[-1]),
        histogram=_histogram(ordered),
    )


def cut(corpus: Corpus) -> Cut:
    """What `max_length` did to the rows of a corpus."""
    flags, longer = corpus.arrays["flags"], corpus.arrays["tokens"] > corpus.max_length
    return _cut(
        corpus,
        corpus.max_length,
        longer=longer,
        losing=longer & (flags & (CUT | DROPPED) > 0),
        lost=longer & (flags & DROPPED > 0),
    )


def would_cut(corpus: Corpus, max_length: int) -> Cut:
    """What cutting at `max_length` tokens would do to the rows of a corpus that was encoded without a limit."""
    longer = corpus.arrays["tokens"] > max_length
    losing, lost = torch.zeros_like(longer), torch.zeros_like(longer)
    examples = corpus.part()
    ends = examples.starts + examples.lengths
    places = examples.loss.nonzero().flatten()
    first = places[torch.searchsorted(places, examples.starts)] - examples.starts
    last = places[torch.searchsorted(places, ends) - 1] - examples.starts
    chosen = examples.text_bytes == 0
    rows = corpus.arrays["row"].long()
    losing[rows[chosen & (last >= max_length)]] = True
    lost[rows[chosen & (first >= max_length)]] = True
    return _cut(corpus, max_length, longer=longer, losing=losing, lost=lost)


def _cut(corpus: Corpus, max_length: int, *, longer: Tensor, losing: Tensor, lost: Tensor) -> Cut:
    """`longer`, `losing` and `lost` tell which rows are so, [R] bool each."""
    return Cut(
        max_length=max_length,
        longer=int(longer.sum()),
        share=float(longer.double().mean()),
        lose_loss=int(losing.sum()),
        lose_answer=int(lost.sum()),
        first=tuple(corpus.place(i) for i in longer.nonzero().flatten()[:3].tolist()),
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


def repeats(traits: Iterable[Trait]) -> list[Pair]:
    """The rows with the same content as an earlier one; white space is not compared.

    >>> rows = (Row("text", f"a:{n}", text=text) for n, text in ((1, "x  y"), (2, "x y")))
    >>> repeats(survey(rows)[1])
    [Pair(row='a:2', same_as='a:1')]
    """
    seen: dict[bytes, str] = {}
    found = []
    for trait in traits:
        first = seen.setdefault(trait.content, trait.source)
        if first != trait.source:
            found.append(Pair(trait.source, first))
    return found


def shared(traits: Iterable[Trait], held_out: Sequence[Trait]) -> tuple[list[Pair], list[Pair]]:
    """The rows that also stand in the held-out rows: with the same content, and with the same question alone."""
    whole = {trait.content: trait.source for trait in reversed(held_out)}
    asked = {trait.question: trait.source for trait in reversed(held_out)}
    same, alike = [], []
    for trait in traits:
        if (source := whole.get(trait.content)) is not None:
            same.append(Pair(trait.source, source))
        elif trait.question is not None and (source := asked.get(trait.question)) is not None:
            alike.append(Pair(trait.source, source))
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


def _answer(row: Row) -> list[object]:
    """What stands after the question."""
    if row.kind == "chat":
        return [row.kind, *_parts(row, _last_answer(row), len(row.messages))]
    return [row.kind, _squeezed(row.completion or row.text)]


def _question(row: Row) -> list[object]:
    """What stands before the last answer; nothing for a text."""
    match row.kind:
        case "chat":
            return list(_parts(row, 0, _last_answer(row)))
        case "completion":
            return [asked] if (asked := _squeezed(row.prompt)) else []
        case _:
            return []


def _last_answer(row: Row) -> int:
    """Index of the last answer of a chat; the number of messages if there is none."""
    roles = [message["role"] for message in row.messages]
    return len(roles) - 1 - roles[::-1].index("assistant") if "assistant" in roles else len(roles)


def _parts(row: Row, start: int, end: int) -> Iterator[object]:
    for message in row.messages[start:end]:
        yield [message["role"], _squeezed(message["content"]), message.get("tool_calls"), reasoning_of(message)]


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _digest(parts: list[object]) -> bytes:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=SIZE).digest()
