"""What becomes of rows that are longer than `max_length` tokens. A row is too long if tokens with loss lie beyond it.

| too_long | chats and completions | texts |
|---|---|---|
| auto | cut at the end; if no loss token is left, the row is refused | split |
| error | refused | refused |
| drop | left out | left out |
| truncate | cut at the end; if no loss token is left, the row is left out | cut at the end |
| split | split; pieces without loss tokens are left out | split |

A row is split into consecutive pieces of at most `max_length` tokens. The first token of a piece has no context and is
not predicted. Rows that are cut or left out are counted, and the first three are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

from reparam.data.answers import Span
from reparam.data.corpus import CUT, DROPPED, SPLIT
from reparam.data.findings import CUTS, LEFT_OUT, Found
from reparam.data.made import Arrays, Collected
from reparam.data.row import Row
from reparam.data.tokenize import Tokens

TooLong = Literal["auto", "error", "drop", "truncate", "split"]


class Lengths:
    """Makes examples of at most `max_length` tokens from the tokenized rows of a batch."""

    def __init__(
        self, *, max_length: int, too_long: TooLong = "auto", with_tasks: bool = False, lenient: bool = False
    ) -> None:
        """With `lenient`, "auto" leaves out the rows that it would refuse: those of a stream are not known before."""
        self._lenient = lenient
        self._max_length, self._too_long, self._with_tasks = max_length, too_long, with_tasks

        self._found = Found((), vocab_size=None, bad_rows="error")
        self._examples = Collected()

    def __call__(self, rows: Sequence[Row], tokenized: Sequence[tuple[int, Tokens]], found: Found) -> Arrays:
        """The examples of a batch of rows.

        `tokenized` has their texts, in order, each with the number of its row: none, one or several for each row.
        """
        self._found, self._examples = found, Collected()
        at = 0
        for number, row in enumerate(rows):
            first = at
            while at < len(tokenized) and tokenized[at][0] == number:
                at += 1
            self._add_row(number, row, [tokens for _, tokens in tokenized[first:at]])
        return self._examples.arrays()

    def _add_row(self, number: int, row: Row, texts: Sequence[Tokens]) -> None:
        flags, longest = (SPLIT if len(texts) > 1 else 0) | (0 if texts else DROPPED), 0
        for tokens in texts:
            length = len(tokens.ids)
            longest = max(longest, length)
            self._found.check_vocabulary(row, tokens.ids)
            predicted = [(first, end) for start, end in tokens.spans if (first := max(start, 1)) < end]
            if not predicted:
                flags |= DROPPED if self._found.refuse(row, _why_nothing(row)) else 0
            elif predicted[-1][1] <= self._max_length:
                self._add(number, tokens, (0, min(length, self._max_length)), predicted)
            else:
                flags |= self._add_long(number, row, tokens, predicted)
        self._examples.add_row(row, longest, flags, with_task=self._with_tasks)

    def _add_long(self, number: int, row: Row, tokens: Tokens, predicted: Sequence[Span]) -> int:
        """Add what becomes of a text that is too long. Returns the flags for its row."""
        limit, wish = self._max_length, self._too_long
        nothing_left = predicted[0][0] >= limit
        if wish == "auto":
            refused = nothing_left and not self._lenient
            wish = "split" if row.kind == "text" else "error" if refused else "truncate"
        if wish == "error":
            what = "cuts off the whole answer of" if nothing_left and self._too_long == "auto" else "is too short for"
            self._found.too_long(row, what, len(tokens.ids))
            return 0
        if wish == "split":
            for piece in _pieces(len(tokens.ids), limit):
                self._add(number, tokens, piece, predicted)
            return SPLIT
        if wish == "drop" or nothing_left:
            self._found.warn(row, LEFT_OUT.format(limit))
            return DROPPED
        self._found.warn(row, CUTS.format(limit))
        self._add(number, tokens, (0, limit), predicted)
        return CUT

    def _add(self, number: int, tokens: Tokens, piece: Span, predicted: Sequence[Span]) -> None:
        """Add the tokens in this range as an example, if any of them but the first one carries loss."""
        begin, end = piece
        spans = [(max(first - begin, 1), min(last, end) - begin) for first, last in predicted]
        spans = [(first, last) for first, last in spans if first < last]
        if spans:
            size = tokens.text.text_bytes(begin, end) if tokens.text is not None else 0
            self._examples.add(number, tokens.ids[begin:end], spans, size)


def _pieces(length: int, limit: int) -> Iterator[Span]:
    """Consecutive ranges of at most `limit` tokens, each of at least two."""
    cuts = [*range(0, length, limit), length]
    if cuts[-1] - cuts[-2] == 1 and len(cuts) > 2:
        cuts[-2] -= 1  # a piece of one token has no predicted token
    yield from pairwise(cuts)


def _why_nothing(row: Row) -> str:
    """Why no token of this row carries loss."""
    match row.kind:
        case "chat" if not any(message["role"] == "assistant" for message in row.messages):
            return "no token carries loss, because no message has the role 'assistant'"
        case "chat":
            return "no token carries loss, because the chat template marks no part of this chat as an answer"
        case "completion":
            return "no token carries loss, because the completion is empty"
        case _:
            return "no token carries loss, because the text is a single token and nothing follows it"
