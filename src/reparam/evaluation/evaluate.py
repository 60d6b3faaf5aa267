"""Score a base model and an adapter on a file of rows: the command `reparam eval`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from reparam.adapter.adapter import Adapter
from reparam.adapter.context import tasks_of
from reparam.adapter.load import place
from reparam.adapter.selection import select
from reparam.data.batches import Encoded
from reparam.data.encode import encode
from reparam.data.row import Row
from reparam.data.rows import read_rows
from reparam.evaluation.engine import answers_of, opened
from reparam.evaluation.score import Answer, Score, answer, answerable, score_answers, score_loss, score_losses
from reparam.evaluation.tables import answers_table, scores_table
from reparam.evaluation.terminal import say, say_json
from reparam.hf.models import vocabulary
from reparam.hf.open import base_of, frame_of, open_model
from reparam.hf.prompts import prompting_of
from reparam.images.rows import ImageRows, WithoutImages
from reparam.images.seeing import Seeing, seeing_of
from reparam.io import files
from reparam.io.files import adapter_folder
from reparam.io.record import Record

if TYPE_CHECKING:
    from reparam.serve import Engine


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of the base model and, if one was given, of the adapter. `answers` holds pairs (base, adapter)."""

    base: tuple[Score, ...]
    adapter: tuple[Score, ...] | None
    answers: tuple[tuple[Answer, Answer], ...]

    def show(self, console: Console, *, json: bool = False) -> None:
        """Print the scores as tables, with up to five answers, or only the scores as a JSON object."""
        if json:
            found = {"base": [dataclasses.asdict(s) for s in self.base]}
            if self.adapter is not None:
                found["adapter"] = [dataclasses.asdict(s) for s in self.adapter]
            say_json(console, found)
        elif self.adapter is None:
            for score in self.base:
                say(console, str(score))
        else:
            say(console, scores_table(self.base, self.adapter))
            if self.answers:
                say(console, answers_table(self.answers[:5]))


def evaluate(
    data: Path,
    base: str | None,
    adapter: str | None,
    *,
    dtype: str,
    max_length: int,
    batch: int,
    storage: str | None = None,
    engine: bool = False,
) -> Evaluation:
    """Score the base model and, if given, the adapter on the rows of the file `data`.

    `max_length` is in tokens, `batch` in rows. Without `base`, the adapter's files name the base model; `dtype` and
    `storage` are those of `reparam.hf.open.open_model`. With `engine`, answers come from the serving engine. Raises
    ValueError if the data, the base model or the adapter cannot be used.
    """
    seeing = _seeing(base, adapter)
    rows = list(ImageRows([data], found=seeing.found) if seeing is not None else WithoutImages([data]))
    model, tokenizer, loaded = open_model(base, adapter, dtype=dtype, storage=storage)
    rows = list(frame_of(tokenizer, loaded).rows(rows))
    size, tasks = vocabulary(model), tasks_of(model)
    encoded = encode(rows, tokenizer, max_length=max_length, vocab_size=size, tasks=tasks, images=seeing)
    scored = functools.partial(scores, model, tokenizer, rows, encoded, batch=batch, longest=max_length, seeing=seeing)
    if engine:
        if seeing is not None:
            raise ValueError("--engine is not for vision-language models; leave it out")
        return _through_engine(model, tokenizer, rows, encoded, adapter, loaded, batch=batch, longest=max_length)
    if loaded is None:
        return Evaluation(scored()[0], None, ())
    select(model, None)
    before, plain = scored()
    select(model, loaded.name)
    after, adapted = scored()
    return Evaluation(before, after, tuple(zip(plain, adapted, strict=True)))


def _seeing(base: str | None, adapter: str | None) -> Seeing | None:
    """What makes the inputs of the base, if it is a vision-language model."""
    folder = adapter_folder(adapter) if adapter is not None else None
    if folder is not None and prompting_of(folder) is not None:
        return None
    path = base or base_of(files.read(folder) if folder is not None else None, folder)
    return seeing_of(path)


def _through_engine(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    encoded: Encoded,
    folder: str | None,
    adapter: Adapter | None,
    *,
    batch: int,
    longest: int,
) -> Evaluation:
    """What `evaluate` returns, with the losses of the model itself and the answers of the serving engine."""
    names = [None] if adapter is None else [None, adapter.name]
    losses = []
    for name in names:
        if adapter is not None:
            select(model, name)
        losses.append(score_loss(model, encoded, tokenizer, batch=batch))
    folders = {} if folder is None or adapter is None else {adapter.name: folder}
    answers: list[list[Answer]] = [[] for _ in names]
    if answerable(rows):
        with opened(model, tokenizer, folders, longest=2 * longest) as engine:
            for name, found in zip(names, answers, strict=True):
                found += answer(
                    model, tokenizer, rows, longest=longest, through=functools.partial(_asked, engine, name)
                )
    scored = [(loss, *([score_answers(own)] if own else [])) for loss, own in zip(losses, answers, strict=True)]
    if adapter is None:
        return Evaluation(scored[0], None, ())
    return Evaluation(scored[0], scored[1], tuple(zip(*answers, strict=True)))


def _asked(engine: Engine, name: str | None, prompts: Sequence[list[int]], most: int) -> list[str]:
    return answers_of(engine, prompts, [name] * len(prompts), max_new_tokens=most)


def scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    encoded: Encoded,
    *,
    batch: int,
    longest: int,
    seeing: Seeing | None = None,
) -> tuple[tuple[Score, ...], list[Answer]]:
    """Score the model with the selected adapter. Returns scores and answers, of at most `longest` tokens.

    `encoded` holds the same rows, encoded.
    """
    answers = answer(model, tokenizer, rows, longest=longest, seeing=seeing)
    losses = score_losses(model, encoded, tokenizer, batch=batch, seeing=seeing)
    found = losses + ([score_answers(answers)] if answers else [])
    return tuple(found), answers


def shrunk(
    data: Path, base: str | None, adapter: str | Path, small: Record, *, dtype: str, max_length: int, batch: int
) -> tuple[tuple[Score, ...], tuple[Score, ...]]:
    """Score an adapter and the smaller adapter `small` that was made from it, on the rows of `data`.

    Returns the scores of both. Raises ValueError if the data, the base model or the adapter cannot be used.
    """
    rows = read_rows(data)
    model, tokenizer, loaded = open_model(base, adapter, dtype=dtype)
    assert loaded is not None
    rows = list(frame_of(tokenizer, loaded).rows(rows))
    encoded = encode(rows, tokenizer, max_length=max_length, vocab_size=vocabulary(model), tasks=tasks_of(model))
    before, _ = scores(model, tokenizer, rows, encoded, batch=batch, longest=max_length)
    place(model, small, Path("the smaller adapter"), name="smaller")
    after, _ = scores(model, tokenizer, rows, encoded, batch=batch, longest=max_length)
    return before, after
