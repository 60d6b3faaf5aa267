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
from itertools import groupby, pairwise
from typing import Literal

import numpy as np

from reparam.data.answers import Span
from reparam.data.corpus import CUT, DROPPED, SPLIT, Arrays
from reparam.data.findings import CUTS, LEFT_OUT, Findings
from reparam.data.row import Row
from reparam.data.tokenize import Tokens

TooLong = Literal["auto", "error", "drop", "truncate", "split"]


class Lengths:
    """Makes examples of at most `max_length` tokens from tokenized rows, and adds them to the arrays."""

    def __init__(
        self,
        arrays: Arrays,
        findings: Findings,
        *,
        max_length: int,
        too_long: TooLong,
        with_tasks: bool,
        lenient: bool = False,
    ) -> None:
        """With `lenient`, "auto" leaves out the rows that it would refuse: those of a stream are not known before."""
        self._arrays, self._findings, self._lenient = arrays, findings, lenient
        self._max_length, self._too_long, self._with_tasks = max_length, too_long, with_tasks
        self.rows = 0
        """Number of rows that were added."""

    def add(self, rows: Sequence[Row], tokenized: Sequence[tuple[Row, Tokens]]) -> None:
        """Add the next rows. `tokenized` has their texts, in order: none, one or several for each row."""
        texts = {
            key: [tokens for _, tokens in group] for key, group in groupby(tokenized, key=lambda pair: id(pair[0]))
        }
        for row in rows:
            self._add_row(row, texts.get(id(row), []))
            self.rows += 1

    def _add_row(self, row: Row, texts: Sequence[Tokens]) -> None:
        flags = (SPLIT if len(texts) > 1 else 0) | (0 if texts else DROPPED)
        for tokens in texts:
            self._findings.check_vocabulary(row, tokens.ids)
            predicted = [(first, end) for start, end in tokens.spans if (first := max(start, 1)) < end]
            if not predicted:
                flags |= DROPPED if self._findings.refuse(row, _why_nothing(row)) else 0
            elif predicted[-1][1] <= self._max_length:
                self._append(row, tokens, (0, min(len(tokens.ids), self._max_length)), predicted)
            else:
                flags |= self._add_long(row, tokens, predicted)
        self._arrays.add_row(row, max((len(t.ids) for t in texts), default=0), flags, with_task=self._with_tasks)

    def _add_long(self, row: Row, tokens: Tokens, predicted: Sequence[Span]) -> int:
        """Add what becomes of a text that is too long. Returns the flags for its row."""
        limit, wish = self._max_length, self._too_long
        nothing_left = predicted[0][0] >= limit
        if wish == "auto":
            refused = nothing_left and not self._lenient
            wish = "split" if row.kind == "text" else "error" if refused else "truncate"
        if wish == "error":
            what = "cuts off the whole answer of" if nothing_left and self._too_long == "auto" else "is too short for"
            self._findings.too_long(row, what, len(tokens.ids))
            return 0
        if wish == "split":
            for piece in _pieces(len(tokens.ids), limit):
                self._append(row, tokens, piece, predicted)
            return SPLIT
        if wish == "drop" or nothing_left:
            self._findings.warn(row, LEFT_OUT.format(limit))
            return DROPPED
        self._findings.warn(row, CUTS.format(limit))
        self._append(row, tokens, (0, limit), predicted)
        return CUT

    def _append(self, row: Row, tokens: Tokens, piece: Span, predicted: Sequence[Span]) -> None:
        """Add the tokens in this range as an example, if any of them carries loss."""
        begin, end = piece
        loss = np.zeros(end - begin, dtype=bool)
        for first, last in predicted:
            loss[max(first - begin, 0) : max(last - begin, 0)] = True
        loss[0] = False
        if loss.any():
            size = tokens.text.text_bytes(begin, end) if tokens.text is not None else 0
            self._arrays.add_example(self.rows, tokens.ids[begin:end], loss, size)


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
