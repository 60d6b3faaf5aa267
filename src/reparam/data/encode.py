"""Encode rows into a dataset of token ids and labels.

`data.tokenize` decides which tokens carry loss; this file enforces `max_length`. Chats and completions that are longer
lose their end. Longer text rows are split into consecutive pieces; the first token of a piece has no context and is not
predicted. Rows without loss tokens are refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, get_args

import torch

from reparam.core.text import counted
from reparam.data.answers import Span
from reparam.data.batches import Encoded, Report
from reparam.data.chat import LossOn
from reparam.data.findings import Findings
from reparam.data.row import Row
from reparam.data.tasks import COLUMN as TASK
from reparam.data.tasks import task_numbers
from reparam.data.tokenize import Tokenizer, Tokens
from reparam.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1024  # rows per tokenizer call: large enough for speed, small enough to keep the offsets in memory
SHORTEST = 3  # smallest max_length with which every piece of a text row has a predicted token


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: LossOn = "answers",
    vocab_size: int | None = None,
    tasks: Sequence[str] = (),
) -> Encoded:
    """Tokenize rows and mark the tokens that carry loss.

    `max_length` is in tokens, at least 3. With `loss_on="all"`, prompts carry loss, too, and with "last" only the last
    answer of a chat does; text rows always carry loss on all tokens. `vocab_size` is the number of rows of the model's
    input embedding. With `tasks`, the column "task" of each row must name one of them, and each example gets its index.

    Raises DataError with all problems: no rows; a slow tokenizer, or one without a chat template if there are chats; a
    chat that the template refuses, partly ignores, or renders so that the answers cannot be located; rows without loss
    tokens; rows whose whole answer lies beyond `max_length`; token ids outside the vocabulary; rows without a known
    task.
    """
    if problems := _obstacles(rows, tokenizer, max_length=max_length, loss_on=loss_on):
        raise DataError(problems)
    findings = Findings(tokenizer, max_length=max_length, vocab_size=vocab_size)
    tokenize = Tokenizer(tokenizer, findings, loss_on=loss_on)
    numbers = {id(row): number for row, number in zip(rows, task_numbers(rows, tasks), strict=True)} if tasks else {}
    store = _Store(findings, max_length=max_length, tasks=numbers)
    for start in range(0, len(rows), BATCH):
        for row, tokens in tokenize(rows[start : start + BATCH]):
            store.add(row, tokens)
    findings.raise_problems()
    return store.encoded(len(rows), unused=(*_unused_columns(rows, tasks), *tokenize.unused()))


def _unused_columns(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    return sorted({key for row in rows for key in row.columns} - ({TASK} if tasks else set()))


def _obstacles(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int, loss_on: str) -> list[str]:
    """Problems that prevent encoding any row."""
    problems: list[str] = []
    if not rows:
        problems.append("there are no rows to encode")
    if max_length < SHORTEST:
        problems.append(f"max_length={max_length} is too short; the minimum is {SHORTEST}")
    if loss_on not in get_args(LossOn):
        problems.append(f"loss_on={loss_on!r}; expected 'answers', 'last' or 'all'")
    if not tokenizer.is_fast:
        problems.append(f"{type(tokenizer).__name__} returns no offsets; load the fast version of this tokenizer")
    chats = [row for row in rows if row.kind == "chat"]
    if chats and not tokenizer.chat_template:
        problems.append(
            f"{chats[0].source}: the tokenizer has no chat template, which {counted(len(chats), 'chat row')} need; "
            "train on prompt and completion instead, add a chat_template.jinja to the tokenizer's folder, or use a "
            "base model that was tuned for chats"
        )
    return problems


class _Store:
    """Collects examples in flat arrays, because Python lists would take ten times the memory."""

    def __init__(self, findings: Findings, *, max_length: int, tasks: Mapping[int, int]) -> None:
        self._findings = findings
        self._task_of = tasks  # id(row) -> number of its task
        self._tasks = array("q")
        self._max_length = max_length
        self._ids = array("i")
        self._loss = bytearray()
        self._starts = array("q", [0])
        self._text_bytes = array("q")
        self._sources: list[str] = []
        self._longest = self._truncated = self._split = 0
        self._row: Row | None = None  # the last one that was added
        self._texts_of_row = 0

    def add(self, row: Row, tokens: Tokens) -> None:
        """Add the examples of a row, or record why the row is refused. A chat may come in several consecutive texts."""
        self._texts_of_row = self._texts_of_row + 1 if row is self._row else 1
        self._row = row
        self._split += self._texts_of_row == 2
        ids, spans = tokens.ids, tokens.spans
        self._findings.check_vocabulary(row, ids)
        self._longest = max(self._longest, len(ids))
        predicted = [(first, end) for start, end in spans if (first := max(start, 1)) < end]
        if not predicted:
            self._findings.refuse(row, _why_nothing(row))
        elif row.kind == "text":
            self._add_pieces(row, tokens)
        elif predicted[0][0] >= self._max_length:
            self._findings.answer_cut_off(row, len(ids))
        else:
            if predicted[-1][1] > self._max_length:
                self._truncated += 1
                self._findings.warn(row, f"max_length={self._max_length} cuts off tokens that would carry loss")
            self._append(row, ids[: self._max_length], predicted)

    def _add_pieces(self, row: Row, tokens: Tokens) -> None:
        length = len(tokens.ids)
        cuts = [*range(0, length, self._max_length), length]
        if cuts[-1] - cuts[-2] == 1 and len(cuts) > 2:
            cuts[-2] -= 1  # a piece of one token has no predicted token
        self._split += len(cuts) > 2
        for start, end in pairwise(cuts):
            text = row.text[tokens.ends[start] : tokens.ends[end - 1]]  # the text of all tokens but the first
            self._append(row, tokens.ids[start:end], [(1, end - start)], text_bytes=len(text.encode()))

    def _append(self, row: Row, ids: list[int], predicted: Sequence[Span], *, text_bytes: int = 0) -> None:
        loss = bytearray(len(ids))
        for start, end in predicted:
            end = min(end, len(ids))
            loss[start:end] = b"\x01" * (end - start)
        self._ids.extend(ids)
        self._loss += loss
        self._starts.append(len(self._ids))
        self._text_bytes.append(text_bytes)
        self._sources.append(row.source)
        if self._task_of:
            self._tasks.append(self._task_of[id(row)])

    def encoded(self, rows: int, *, unused: Sequence[str]) -> Encoded:
        """The dataset of all examples. `unused` are the keys of rows and messages that change nothing."""
        loss = torch.frombuffer(self._loss, dtype=torch.bool)
        report = Report(
            rows=rows,
            examples=len(self._sources),
            tokens=len(self._ids),
            loss_tokens=int(loss.sum()),
            text_bytes=sum(self._text_bytes),
            longest=self._longest,
            truncated=self._truncated,
            split=self._split,
            unused=tuple(unused),
            warnings=self._findings.warnings(),
        )
        return Encoded(
            ids=torch.frombuffer(self._ids, dtype=torch.int32),
            loss=loss,
            starts=torch.frombuffer(self._starts, dtype=torch.int64),
            text_bytes=torch.frombuffer(self._text_bytes, dtype=torch.int64),
            sources=self._sources,
            report=report,
            tasks=torch.frombuffer(self._tasks, dtype=torch.int64) if self._tasks else None,
        )


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
