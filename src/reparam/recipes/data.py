"""`reparam data`: what training would make of a file of rows, without loading the base model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from reparam.data import study
from reparam.data.batches import Encoded
from reparam.data.corpus import Corpus
from reparam.data.encode import encode_all
from reparam.data.rows import Reading
from reparam.errors import ConfigError, DataError
from reparam.hf.embedding import Sizes, sizes_of, untrained_tokens
from reparam.train.config import Config
from reparam.train.data import held_out as held_out_of
from reparam.train.data import read_data
from reparam.train.reading import frame_of, tokenizer_of

SFT = "sft"
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

    files: tuple[str, ...]
    """The sources of the rows, by name."""
    base: str | None
    contents: study.Contents
    held_out: int
    """Number of rows that training would hold out for scores."""
    held_out_from: tuple[str, ...]
    """The sources of the held-out rows; `files` if training would draw them from these."""
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

    Raises ConfigError if `data.train` is not set, DataError for rows that cannot be read, and BaseError if `base.path`
    is set and there is no causal language model with a tokenizer.
    """
    data = config.data
    if not data.train:
        raise ConfigError("data.train must be set: give the file of rows, as in  reparam data rows.jsonl")
    if config.run.objective != SFT:
        raise ConfigError(f"run.objective: {config.run.objective}: only rows of supervised training are studied")
    if data.streaming and not data.max_rows:
        raise ConfigError(
            "data.streaming: duplicates and lengths need all rows; set data.max_rows to study the first rows of the "
            "stream, or leave out data.streaming"
        )
    problems: list[str] = []
    reading = Reading(
        data.sources(), data.renamed(), most=data.max_rows, bad_rows=data.bad_rows, streaming=data.streaming
    )
    contents, traits = study.survey(reading)
    training, held_out = traits, []
    if data.valid is not None:
        held_out = study.survey(Reading(data.sources("valid"), data.renamed(), bad_rows=data.bad_rows))[1]
    else:
        with _noted(problems):
            held = held_out_of(config, len(traits))
            training, held_out = (
                [trait for trait, out in zip(traits, held, strict=True) if out == wanted] for wanted in (False, True)
            )
    same, alike = study.shared(training, held_out)
    found = Study(
        files=data.sources(),
        base=config.base.path or None,
        contents=contents,
        held_out=len(held_out),
        held_out_from=data.sources("valid") or data.sources(),
        duplicates=tuple(study.repeats(traits)),
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
    return _measured(found, config) if config.base.path else Studied(found)


def _measured(found: Study, config: Config) -> Studied:
    """The study with what the tokenizer and the embeddings of the base tell."""
    path, revision = config.base.path, config.base.revision
    tokenizer, sizes = tokenizer_of(config), sizes_of(path, revision=revision)
    problems = list(found.problems)
    corpus = shown = None
    with _noted(problems):
        data = read_data(config, tokenizer)
        data.check_vocabulary(sizes.vocabulary, tokenizer)
        assert isinstance(data.checked[0], Corpus)
        assert isinstance(data.train, Encoded)
        corpus, shown = data.checked[0], data.train
        cut = study.cut(corpus)
    if corpus is None:
        with contextlib.suppress(DataError, ConfigError):
            corpus = _without_limit(config, tokenizer)
            shown, cut = corpus.part(), study.would_cut(corpus, config.data.max_length)
    found = dataclasses.replace(found, context=sizes.context, problems=tuple(dict.fromkeys(problems)))
    if corpus is None or shown is None:
        return Studied(found)
    found_sizes = corpus.arrays["tokens"]
    measured = study.lengths(found_sizes[found_sizes > 0])  # a row that cannot be tokenized has none
    report = shown.report
    found = dataclasses.replace(
        found,
        tokens=int(corpus.arrays["lengths"].sum()),
        loss_tokens=int(corpus.arrays["loss_tokens"].sum()),
        lengths=measured,
        cut=cut,
        recommended_max_length=study.recommended(measured, context=sizes.context),
        unseen=_unseen(corpus, config, sizes, tokenizer),
        not_used=report.unused,
        warnings=report.warnings,
    )
    return Studied(found, shown, tokenizer)


def _without_limit(config: Config, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """The rows that can be encoded, of any length, for figures about rows that training refuses."""
    data = config.data
    rows = Reading(data.sources(), data.renamed(), most=data.max_rows, bad_rows="drop", streaming=data.streaming)
    framed = frame_of(data, tokenizer).rows(rows)
    return encode_all(
        framed, tokenizer, max_length=UNLIMITED, loss_on=data.loss_on, bad_rows="drop", workers=data.workers
    )


def _unseen(
    corpus: Corpus, config: Config, sizes: Sizes, tokenizer: PreTrainedTokenizerBase
) -> tuple[Unseen, ...] | None:
    never = untrained_tokens(config.base.path, sizes, len(tokenizer), revision=config.base.revision)
    if never is None:
        return None
    counts = torch.bincount(corpus.arrays["ids"], minlength=sizes.vocabulary)
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
