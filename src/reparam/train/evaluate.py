"""`reparam eval`: scores of a base and an adapter on a file of rows."""

from __future__ import annotations

import dataclasses
import json as json_
from pathlib import Path

from rich.console import Console

from reparam.adapter import select
from reparam.context import tasks_of
from reparam.data.encode import encode
from reparam.data.rows import read_rows
from reparam.hf import vocabulary
from reparam.open import open_model
from reparam.train.score import Answer, Score, answer, score_answers, score_loss
from reparam.train.show import answers_table, scores_table


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
    found = []
    for name in [None] if loaded is None else [None, loaded.name]:
        if loaded is not None:
            select(model, name)
        answers = answer(model, tokenizer, rows)
        scores = [score_loss(model, encoded, tokenizer, batch=batch)] + ([score_answers(answers)] if answers else [])
        found.append((tuple(scores), answers))
    if loaded is None:
        return Evaluation(found[0][0], None, ())
    return Evaluation(found[0][0], found[1][0], tuple(zip(found[0][1], found[1][1], strict=True)))
