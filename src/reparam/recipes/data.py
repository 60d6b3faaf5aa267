"""`reparam data`: what training would make of a file of rows, without loading the base model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from reparam.data import study
from reparam.data.batches import Encoded
from reparam.data.encode import encode
from reparam.data.row import Row
from reparam.data.rows import read_rows
from reparam.errors import ConfigError, DataError
from reparam.hf.embedding import Sizes, sizes_of, untrained_tokens
from reparam.train.config import Config
from reparam.train.model import by_task
from reparam.train.reading import frame_of, tokenizer_of
from reparam.train.run import held_apart

UNLIMITED = 2**31 - 1  # tokens


class Unseen(NamedTuple):
    """A token of the rows whose embedding the base never trained."""

    token: str
    id: int
    times: int
    """Number of times that it occurs in the rows."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What is known about a file of rows. What needs the tokenizer is None without a base, and for refused rows."""

    file: str
    base: str | None
    contents: study.Contents
    held_out: int
    """Number of rows that training would hold out for scores."""
    held_out_from: str
    """The file of the held-out rows; the file itself if training would draw them from it."""
    duplicates: tuple[study.Pair, ...]
    in_held_out: tuple[study.Pair, ...]
    """Training rows that also stand in the held-out rows."""
    question_in_held_out: tuple[study.Pair, ...]
    """Training rows whose question stands in the held-out rows, with another answer."""
    tokens: int | None
    loss_tokens: int | None
    lengths: study.Lengths | None
    cut: study.Cut | None
    recommended_max_length: int | None
    context: int | None
    """The context length of the base, in tokens."""
    unseen: tuple[Unseen, ...] | None
    """The tokens that the base never saw; None if that cannot be told."""
    not_used: tuple[str, ...]
    """Keys that change nothing."""
    warnings: tuple[str, ...]
    problems: tuple[str, ...]
    """Why training would be refused; empty if it would not be."""


class Studied(NamedTuple):
    """A study, with the encoded rows and their tokenizer, for a preview."""

    study: Study
    encoded: Encoded | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


def studied(config: Config) -> Studied:
    """Study the rows of `data.train`, as training with this configuration would read them.

    Raises ConfigError if `data.train` is not set, DataError for a file that cannot be read, and BaseError if
    `base.path` is set and there is no causal language model with a tokenizer.
    """
    if not config.data.train:
        raise ConfigError("data.train must be set: give the file of rows, as in  reparam data rows.jsonl")
    rows = read_rows(config.data.train, config.data.renamed())
    problems: list[str] = []
    training = rows
    held_out: list[Row] = []
    with _noted(problems):
        training, held_out = held_apart(rows, config)
    same, alike = study.shared(training, held_out)
    found = Study(
        file=config.data.train,
        base=config.base.path or None,
        contents=study.contents(rows),
        held_out=len(held_out),
        held_out_from=config.data.valid or config.data.train,
        duplicates=tuple(study.repeats(rows)),
        in_held_out=tuple(same),
        question_in_held_out=tuple(alike),
        tokens=None,
        loss_tokens=None,
        lengths=None,
        cut=None,
        recommended_max_length=None,
        context=None,
        unseen=None,
        not_used=(),
        warnings=(),
        problems=tuple(problems),
    )
    return _measured(found, config, rows, held_out) if config.base.path else Studied(found)


def _measured(found: Study, config: Config, rows: Sequence[Row], held_out: Sequence[Row]) -> Studied:
    """The study with what the tokenizer and the embeddings of the base tell."""
    data, path, revision = config.data, config.base.path, config.base.revision
    tokenizer, sizes = tokenizer_of(config), sizes_of(path, revision=revision)
    problems = list(found.problems)

    def encoded(chosen: Sequence[Row], max_length: int) -> Encoded:
        return encode(
            chosen, tokenizer, max_length=max_length, loss_on=data.loss_on, vocab_size=sizes.vocabulary, tasks=tasks
        )

    tasks: tuple[str, ...] = ()
    whole = limited = None
    with _noted(problems):
        framed = frame_of(data, tokenizer, rows)
        rows, held_out = framed.rows(rows), framed.rows(held_out)
        tasks = by_task(config.method, rows)[1]
        whole = encoded(rows, UNLIMITED)
    if whole is not None:
        limited = whole
        if whole.report.longest > data.max_length:
            with _noted(problems):
                limited = encoded(rows, data.max_length)
    if data.valid is not None:
        with _noted(problems):
            encoded(held_out, data.max_length)
    found = dataclasses.replace(found, context=sizes.context, problems=tuple(dict.fromkeys(problems)))
    if whole is None or limited is None:
        return Studied(found)
    measured = study.lengths(whole)
    found = dataclasses.replace(
        found,
        tokens=whole.report.tokens,
        loss_tokens=whole.report.loss_tokens,
        lengths=measured,
        cut=study.cut(whole, data.max_length),
        recommended_max_length=study.recommended(measured, context=sizes.context),
        unseen=_unseen(whole, config, sizes, tokenizer),
        not_used=limited.report.unused,
        warnings=limited.report.warnings,
    )
    return Studied(found, limited, tokenizer)


def _unseen(
    encoded: Encoded, config: Config, sizes: Sizes, tokenizer: PreTrainedTokenizerBase
) -> tuple[Unseen, ...] | None:
    never = untrained_tokens(config.base.path, sizes, len(tokenizer), revision=config.base.revision)
    if never is None:
        return None
    counts = torch.bincount(encoded.ids, minlength=sizes.vocabulary)
    used = [(int(counts[i]), i) for i in never if counts[i] > 0]
    return tuple(Unseen(str(tokenizer.convert_ids_to_tokens(i)), i, n) for n, i in sorted(used, reverse=True))


@contextlib.contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Append the reasons for which training would be refused to `problems`."""
    try:
        yield
    except DataError as error:
        problems.extend(error.problems)
    except ConfigError as error:
        problems.append(str(error))
