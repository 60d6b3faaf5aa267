"""Encode rows into a dataset of token ids and labels.

`data.tokenize` decides which tokens carry loss, and `data.lengths` what becomes of rows that are longer than
`max_length`. Rows are taken from a stream in batches, and what is made of them is kept in flat arrays (`data.flat`), in
files when they are large. Rows without loss tokens are refused.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch

from reparam.core.progress import waiting
from reparam.core.text import counted
from reparam.data.batches import Encoded
from reparam.data.chat import LossOn
from reparam.data.corpus import Corpus, Gathered
from reparam.data.encoder import Encoder, Settings
from reparam.data.findings import BadRows, Findings
from reparam.data.lengths import TooLong
from reparam.data.row import Row
from reparam.data.workers import encoded
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
) -> Encoded:
    """Tokenize rows and mark the tokens that carry loss.

    `max_length` is in tokens, at least 3. With `loss_on="all"`, prompts carry loss, too, and with "last" only the last
    answer of a chat does; text rows always carry loss on all tokens. `vocab_size` is the number of rows of the model's
    input embedding. With `tasks`, the column "task" of each row must name one of them, and each example gets its index.
    `too_long` says what becomes of longer rows (`data.lengths`). With `bad_rows="drop"`, rows that cannot be trained on
    are left out and counted.

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
    with_tasks: bool = False,
    folder: Path | None = None,
    about: int | None = None,
    lenient: bool = False,
    workers: int | None = 1,
) -> Corpus:
    """As `encode`, but the result is a corpus, from which parts are taken. It can be larger than the memory.

    With `with_tasks`, it knows the tasks of the rows. The arrays are written into the files of `folder`, if one is
    given. `about` is the approximate number of rows, to tell the time left. With `lenient`, rows that are refused
    because their whole answer would be cut off are left out. `workers` is the number of processes that encode, which
    changes nothing in the result; None is a number that suits the machine and the size of the rows. Raises DataError as
    `encode` does, but for tasks.
    """
    iterator = iter(rows)
    start = next(iterator, None)
    if problems := _obstacles(start, tokenizer, max_length=max_length, loss_on=loss_on):
        raise DataError(problems)
    assert start is not None
    findings = Findings(tokenizer, max_length=max_length, vocab_size=vocab_size)
    settings = Settings(max_length, loss_on, vocab_size, too_long, bad_rows, with_tasks, lenient)
    make = functools.partial(Encoder, tokenizer, settings)
    gathered = Gathered(folder)
    columns: set[str] = set()
    uses: dict[str, bool] = {}
    kinds: Counter[str] = Counter()
    batches = _batches(with_template(chain([start], iterator), tokenizer))
    with (
        waiting("encoding rows", len(rows) if isinstance(rows, Sized) else about, unit="rows") as advance,
        closing(encoded(batches, make, workers)) as made,
    ):
        for batch, part in made:
            findings.add(part.found, gathered.rows)
            gathered.add(part.arrays)
            columns |= part.columns
            uses |= {key: used or uses.get(key, False) for key, used in part.uses.items()}
            kinds += part.kinds
            advance(len(batch))
    findings.raise_problems()
    return Corpus(
        arrays=gathered.arrays(),
        names=list(gathered.names),
        tasks=list(gathered.tasks),
        marks={what: torch.from_numpy(np.unique(np.array(found))) for what, found in findings.marks.items()},
        reasons=findings.reasons,
        unused=[*sorted(columns), *sorted(key for key, used in uses.items() if not used)],
        max_length=max_length,
        largest=gathered.largest,
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
