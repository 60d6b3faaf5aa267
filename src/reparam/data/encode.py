"""Encode rows into a dataset of token ids and labels.

`data.tokenize` decides which tokens carry loss, and `data.lengths` what becomes of rows that are longer than
`max_length`. Rows are taken from a stream in batches, and what is made of them is kept in flat arrays (`data.flat`), in
files when they are large. Rows without loss tokens are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch

from reparam.core.progress import waiting
from reparam.core.text import counted
from reparam.data.batches import Encoded
from reparam.data.chat import LossOn
from reparam.data.corpus import Arrays, Corpus, growing
from reparam.data.findings import BadRows, Findings
from reparam.data.lengths import Lengths, TooLong
from reparam.data.placing import Placing
from reparam.data.row import Row
from reparam.data.tokenize import Tokenizer
from reparam.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1024  # rows per tokenizer call: large enough for speed, small enough to keep the offsets in memory
CHARACTERS = 1 << 19  # of a batch of long rows
SHORTEST = 3  # smallest max_length with which every piece of a text row has a predicted token


def encode(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: LossOn = "answers",
    vocab_size: int | None = None,
    tasks: Sequence[str] = (),
    too_long: TooLong = "auto",
    bad_rows: BadRows = "error",
    images: Placing | None = None,
) -> Encoded:
    """Tokenize rows and mark the tokens that carry loss.

    `max_length` is in tokens, at least 3. With `loss_on="all"`, prompts carry loss, too, and with "last" only the last
    answer of a chat does; text rows always carry loss on all tokens. `vocab_size` is the number of rows of the model's
    input embedding. With `tasks`, the column "task" of each row must name one of them, and each example gets its index.
    `too_long` says what becomes of longer rows (`data.lengths`). With `bad_rows="drop"`, rows that cannot be trained on
    are left out and counted. `images` says how a vision-language model writes the images of the rows.

    Raises DataError with all problems: no rows; a slow tokenizer, or one without a chat template if there are chats; a
    chat that the template refuses, partly ignores, or renders so that the answers cannot be located; rows without loss
    tokens; rows whose whole answer lies beyond `max_length`; token ids outside the vocabulary; rows without a known
    task.
    """
    corpus = encode_all(
        rows,
        tokenizer,
        max_length=max_length,
        loss_on=loss_on,
        vocab_size=vocab_size,
        too_long=too_long,
        bad_rows=bad_rows,
        images=images,
        with_tasks=bool(tasks),
    )
    return corpus.part(tasks=tasks)


def encode_all(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: LossOn = "answers",
    vocab_size: int | None = None,
    too_long: TooLong = "auto",
    bad_rows: BadRows = "error",
    images: Placing | None = None,
    with_tasks: bool = False,
    folder: Path | None = None,
    about: int | None = None,
    lenient: bool = False,
) -> Corpus:
    """As `encode`, but the result is a corpus, from which parts are taken. It can be larger than the memory.

    With `with_tasks`, it knows the tasks of the rows. The arrays are written into the files of `folder`, if one is
    given. `about` is the approximate number of rows, to tell the time left. With `lenient`, rows that are refused
    because their whole answer would be cut off are left out. Raises DataError as `encode` does, but for tasks.
    """
    iterator = iter(rows)
    start = next(iterator, None)
    if problems := _obstacles(start, tokenizer, max_length=max_length, loss_on=loss_on):
        raise DataError(problems)
    assert start is not None
    findings = Findings(tokenizer, max_length=max_length, vocab_size=vocab_size, bad_rows=bad_rows)
    tokenize = Tokenizer(tokenizer, findings, loss_on=loss_on, images=images)
    arrays = Arrays(growing(folder))
    lengths = Lengths(
        arrays, findings, max_length=max_length, too_long=too_long, with_tasks=with_tasks, lenient=lenient
    )
    columns: set[str] = set()
    kinds: Counter[str] = Counter()
    with waiting("encoding rows", len(rows) if isinstance(rows, Sized) else about, unit="rows") as advance:
        for batch in _batches(with_template(chain([start], iterator), tokenizer)):
            findings.begin(batch, lengths.rows)
            columns.update(*(row.columns for row in batch))
            kinds.update(row.kind for row in batch)
            lengths.add(batch, tokenize(batch))
            advance(len(batch))
    findings.raise_problems()
    return Corpus(
        arrays={name: array.values() for name, array in arrays.of.items()},
        names=list(arrays.names),
        tasks=list(arrays.tasks),
        marks={what: torch.from_numpy(np.unique(np.array(found))) for what, found in findings.marks.items()},
        reasons=findings.reasons,
        unused=[*sorted(columns), *tokenize.unused()],
        max_length=max_length,
        largest=arrays.largest,
        kinds=dict(kinds),
    )


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in batches of limited number and size."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row.characters
        if len(batch) == BATCH or size > CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _obstacles(start: Row | None, tokenizer: PreTrainedTokenizerBase, *, max_length: int, loss_on: str) -> list[str]:
    """Problems that prevent encoding any row. `start` is the first one."""
    problems: list[str] = []
    if start is None:
        problems.append("there are no rows to encode")
    if max_length < SHORTEST:
        problems.append(f"max_length={max_length} is too short; the minimum is {SHORTEST}")
    if loss_on not in get_args(LossOn):
        problems.append(f"loss_on={loss_on!r}; expected 'answers', 'last' or 'all'")
    if not tokenizer.is_fast:
        problems.append(f"{type(tokenizer).__name__} returns no offsets; load the fast version of this tokenizer")
    return problems


def with_template(rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    """The rows. Raises DataError at the first chat if the tokenizer has no chat template."""
    for row in rows:
        if row.kind == "chat" and not tokenizer.chat_template:
            count = 1 + sum(other.kind == "chat" for other in rows)
            raise DataError(
                [
                    f"{row.source}: the tokenizer has no chat template, which {counted(count, 'chat row')} need; "
                    "train on prompt and completion instead, choose a template (--data.chat_template plain suits every "
                    "base), add a chat_template.jinja to the tokenizer's folder, or use a base that was tuned for chats"
                ]
            )
        yield row
