"""`reparam eval`: scores of a base and an adapter on a file of rows."""

from __future__ import annotations

import dataclasses
import json as json_
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from reparam.adapter.attach import select
from reparam.adapter.context import tasks_of
from reparam.adapter.load import place
from reparam.data.batches import Encoded
from reparam.data.encode import encode
from reparam.data.rows import Row, read_rows
from reparam.evaluation.score import Answer, Score, answer, score_answers, score_loss
from reparam.evaluation.tables import answers_table, scores_table
from reparam.hf.models import vocabulary
from reparam.hf.open import open_model
from reparam.io.record import Record


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of the base and, where one was given, of the adapter."""

    base: tuple[Score, ...]
    adapter: tuple[Score, ...] | None
    answers: tuple[tuple[Answer, Answer], ...]

    def show(self, console: Console, *, json: bool = False) -> None:
        """Print as tables, or as one JSON object."""
        if json:
            found = {"base": [dataclasses.asdict(s) for s in self.base]}
            if self.adapter is not None:
                found["adapter"] = [dataclasses.asdict(s) for s in self.adapter]
            console.print_json(json_.dumps(found))
        elif self.adapter is None:
            for score in self.base:
                console.print(str(score))
        else:
            console.print(scores_table(self.base, self.adapter))
            if self.answers:
                console.print(answers_table(self.answers[:5]))


def evaluate(
    data: Path,
    base: str | None,
    adapter: str | None,
    *,
    dtype: str,
    max_length: int,
    batch: int,
    storage: str | None = None,
) -> Evaluation:
    """Score on the rows of `data`. Raises ValueError for unusable data, base or adapter."""
    rows = read_rows(data)
    model, tokenizer, loaded = open_model(base, adapter, dtype=dtype, storage=storage)
    size, tasks = vocabulary(model), tasks_of(model)
    encoded = encode(rows, tokenizer, max_length=max_length, vocab_size=size, tasks=tasks)
    if loaded is None:
        return Evaluation(scores(model, tokenizer, rows, encoded, batch=batch)[0], None, ())
    select(model, None)
    before, plain = scores(model, tokenizer, rows, encoded, batch=batch)
    select(model, loaded.name)
    after, adapted = scores(model, tokenizer, rows, encoded, batch=batch)
    return Evaluation(before, after, tuple(zip(plain, adapted, strict=True)))


def scores(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], encoded: Encoded, *, batch: int
) -> tuple[tuple[Score, ...], list[Answer]]:
    """The scores of a model as it is now, and its answers; `encoded` are the same rows."""
    answers = answer(model, tokenizer, rows)
    found = [score_loss(model, encoded, tokenizer, batch=batch)] + ([score_answers(answers)] if answers else [])
    return tuple(found), answers


def shrunk(
    data: Path, base: str | None, adapter: str | Path, small: Record, *, dtype: str, max_length: int, batch: int
) -> tuple[tuple[Score, ...], tuple[Score, ...]]:
    """The scores on the rows of `data` with an adapter, and with a smaller one made of it.

    Raises ValueError for unusable data, base or adapter.
    """
    rows = read_rows(data)
    model, tokenizer, loaded = open_model(base, adapter, dtype=dtype)
    assert loaded is not None
    encoded = encode(rows, tokenizer, max_length=max_length, vocab_size=vocabulary(model), tasks=tasks_of(model))
    before, _ = scores(model, tokenizer, rows, encoded, batch=batch)
    place(model, small, Path("the smaller adapter"), name="smaller")
    after, _ = scores(model, tokenizer, rows, encoded, batch=batch)
    return before, after
