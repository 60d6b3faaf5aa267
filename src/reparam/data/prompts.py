"""Prompts to which a model writes its own answers during training, with the other keys of their rows.

A row is {"prompt": ...}, a string or a list of messages, or a row of supervised training. The last answer of such a row
is passed on under the key "answer", and not shown to the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from reparam.data.batches import Encoded, Report
from reparam.data.chat import ChatTemplate
from reparam.data.files import objects
from reparam.data.findings import beyond_vocabulary
from reparam.data.formats import read_row, renamed
from reparam.data.formats.format import check_strings, read_json
from reparam.data.messages import checked_messages
from reparam.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """A prompt."""

    source: str
    prompt: str | tuple[Mapping[str, Any], ...]
    columns: Mapping[str, Any]
    """The other keys of the row; the expected answer, if there is one, under "answer"."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """Encoded prompts. The length is the number of answers that are generated for all of them."""

    asked: Sequence[Asked]
    encoded: Encoded
    """The prompts; no token carries loss."""
    samples: int
    """Number of answers for each prompt."""

    def __len__(self) -> int:
        return len(self.asked) * self.samples

    @property
    def sources(self) -> list[str]:
        """Where each prompt comes from, as "file:line"."""
        return [each.source for each in self.asked]

    @property
    def report(self) -> Report:
        """Counts of the prompts."""
        return self.encoded.report

    def check_vocabulary(self, size: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise DataError, with the first prompt of each, for token ids of at least `size`."""
        check_vocabulary(self.encoded, size, tokenizer)

    def digest(self) -> str:
        """SHA-256 of all prompts and of the other keys of their rows."""
        columns = json.dumps([dict(each.columns) for each in self.asked], sort_keys=True, default=str)
        return hashlib.sha256(f"{self.encoded.digest()} {columns}".encode()).hexdigest()


def check_vocabulary(encoded: Encoded, size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError, with the first example of each, for token ids of at least `size`."""
    found: dict[int, tuple[str, int]] = {}
    for index, source in enumerate(encoded.sources):
        ids = encoded[index]["input_ids"]
        for token in ids[ids >= size].unique().tolist():
            first, count = found.get(token, (source, 0))
            found[token] = (first, count + 1)
    if found:
        raise DataError(beyond_vocabulary(found, size, tokenizer))


def read_items(source: str | Path, read: Callable[[Mapping[str, Any], str], list[T]], *, expected: str) -> list[T]:
    """What `read` makes of each object of a source and its place. Raises DataError with the problems of all objects."""
    found: list[T] = []
    problems: list[str] = []
    for place, value in objects(source):
        try:
            if isinstance(value, DataError):
                raise value
            found += read(value, place)
        except DataError as error:
            problems.extend(error.problems)
    if not found and not problems:
        problems.append(f"{source}: the file is empty; expected objects with {expected}")
    if problems:
        raise DataError(problems)
    return found


def read_prompts(source: str | Path, columns: Mapping[str, str] | None = None) -> list[Asked]:
    """Read the prompts of a file, a glob, a folder, a data set or standard input, as `read_rows` reads rows.

    Raises DataError, with all problems, for a source that cannot be read, and for rows without a prompt.
    """
    return read_items(source, lambda value, place: [_asked(value, place, columns or {})], expected='"prompt"')


def _asked(value: Mapping[str, Any], source: str, columns: Mapping[str, str]) -> Asked:
    given = renamed(value, source, columns)
    if "prompt" in given and "completion" not in given:
        prompt = given.pop("prompt")
        messages = read_json(prompt) if isinstance(prompt, str) and prompt.lstrip()[:1] == "[" else prompt
        if isinstance(messages, list):
            return Asked(source, checked_messages(messages, source), given)
        check_strings({"prompt": prompt}, ("prompt",), source)
        return Asked(source, prompt, given)
    row = read_row(value, source, columns)
    if row.kind == "completion":
        return Asked(source, row.prompt, {**row.columns, "answer": row.completion})
    if row.kind == "text":
        raise DataError([f'{source}: a text has no prompt to answer; expected "prompt", or a row with an answer'])
    *before, last = row.messages
    if last["role"] != "assistant" or not before:
        return Asked(source, tuple(row.messages), dict(row.columns))
    return Asked(source, tuple(before), {**row.columns, "answer": last["content"]})


def encode_prompts(
    asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, *, samples: int, max_length: int
) -> Prompts:
    """Encode prompts up to where an answer begins.

    Raises DataError, with all problems, for prompts without tokens or longer than `max_length` tokens, and for chats
    that the template refuses or if there is no template.
    """
    ids: list[list[int]] = []
    problems: list[str] = []
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    for each in asked:
        if isinstance(each.prompt, str):
            found = list(tokenizer(each.prompt)["input_ids"])
        elif template is None:
            raise DataError([f"{each.source}: the tokenizer has no chat template, which a prompt of messages needs"])
        else:
            try:
                found = list(tokenizer(template.prompt(each.prompt), add_special_tokens=False)["input_ids"])
            except DataError:
                raise
            except ValueError as error:
                problems.append(f"{each.source}: {error}")
                continue
        if not found or len(found) > max_length:
            what = f"{len(found):,} tokens, more than max_length={max_length}" if found else "no tokens"
            problems.append(f"{each.source}: the prompt has {what}")
        ids.append(found)
    if problems:
        raise DataError(problems)
    lengths = np.array([len(one) for one in ids], dtype=np.int64)
    flat = torch.tensor([token for one in ids for token in one], dtype=torch.int32)
    longest = int(lengths.max())
    report = Report(
        rows=len(ids),
        examples=len(ids),
        tokens=len(flat),
        loss_tokens=0,
        text_bytes=0,
        longest=longest,
        truncated=0,
        split=0,
    )
    encoded = Encoded(
        ids=flat,
        loss=torch.zeros(len(flat), dtype=torch.bool),
        starts=torch.from_numpy(np.cumsum(lengths) - lengths),
        lengths=torch.from_numpy(lengths),
        text_bytes=torch.zeros(len(ids), dtype=torch.int64),
        sources=[each.source for each in asked],
        report=report,
    )
    return Prompts(asked, encoded, samples)
