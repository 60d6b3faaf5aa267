"""Tokenize rows and decide which tokens carry loss. By kind of row:

- chat: the answers, each with the token that ends its turn (`data.chat` finds them in the rendered text).
- completion: the completion and the end token. Prompt and completion are tokenized separately, so that no token spans
  the boundary, and the prompt has the same ids as in generation.
- text: all tokens, including the end token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from reparam.data.answers import Rendered, Span
from reparam.data.chat import ChatTemplate, LossOn, special_tokens
from reparam.data.findings import Findings
from reparam.data.row import Row
from reparam.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokens(NamedTuple):
    """A tokenized row."""

    ids: np.ndarray
    """Token ids, [T] int32."""
    spans: list[Span]
    """Token ranges [start, end) that carry loss, ascending."""
    text: str = ""
    """The content of a text row."""
    ends: Sequence[int] = ()
    """For a text row, the character position in the text at which each token ends."""

    def text_between(self, start: int, end: int) -> str:
        """The text of the tokens in this range, but for the first one."""
        return self.text[self.ends[start] : self.ends[end - 1]]


class Tokenizer:
    """Tokenizes rows in batches. Needs a fast tokenizer, and a chat template if there are chats.

    Completion and text rows get the tokens that the tokenizer puts at the start of a sequence and its end token, unless
    the row already contains them. Chats get only the special tokens of their template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, findings: Findings, *, loss_on: LossOn) -> None:
        self._tokenizer = tokenizer
        self._findings = findings
        self._loss_on: LossOn = loss_on
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        self._specials = special_tokens(tokenizer)
        self._special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        probe = tokenizer("a", return_special_tokens_mask=True)
        leading = len(list(takewhile(bool, probe["special_tokens_mask"])))
        self._prefix: list[int] = probe["input_ids"][:leading]

    def __call__(self, rows: Sequence[Row]) -> list[tuple[Row, Tokens]]:
        """Tokenize rows. Keeps their order, and leaves out rows that are refused and recorded in the findings.

        A chat comes several times if its template makes it one text for each answer.
        """
        done: list[tuple[int, Tokens]] = []  # (position in `rows`, tokens)
        for kind, tokenize in (("chat", self._chats), ("completion", self._completions), ("text", self._texts)):
            chosen = [i for i, row in enumerate(rows) if row.kind == kind]
            if chosen:
                done += [(chosen[i], tokens) for i, tokens in tokenize([rows[i] for i in chosen])]
        return [(rows[i], tokens) for i, tokens in sorted(done, key=lambda pair: pair[0])]

    def unused(self) -> list[str]:
        """The keys of messages and of chats that changed nothing in the text of the rows so far."""
        return self._template.unused() if self._template else []

    def _ids_and_offsets(self, texts: list[str]) -> tuple[list[list[int]], list[list[Span]]]:
        """The token ids of each text and the character range of each token; no special tokens are added."""
        if not texts:
            return [], []
        batch = self._tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,  # do not warn of rows longer than the model's limit; they are truncated or split later
        )
        return batch["input_ids"], batch["offset_mapping"]

    # --- the three kinds of rows; each yields (position in `rows`, tokens) ---

    def _chats(self, rows: Sequence[Row]) -> Iterator[tuple[int, Tokens]]:
        assert self._template is not None
        chats: list[tuple[int, Rendered]] = []
        for i, row in enumerate(rows):
            self._look_at(row, *(message["content"] for message in row.messages))
            if any(_is_empty(message) for message in row.messages):
                self._findings.warn(row, "an answer is empty, so only its end token is learned")
            try:
                rendered = self._template.render(row.messages, loss_on=self._loss_on, variables=row.variables)
            except DataError as error:
                raise DataError([f"{row.source}: {error}"]) from error
            except ValueError as error:
                self._findings.refuse(row, str(error))
                continue
            chats += [(i, part) for part in rendered]
            for warning in dict.fromkeys(warning for part in rendered for warning in part.warnings):
                self._findings.warn(row, warning)
        batch = self._ids_and_offsets([chat.text for _, chat in chats])
        for (i, chat), ids, offsets in zip(chats, *batch, strict=True):
            spans = self._token_spans(rows[i], chat.spans, ids=ids, offsets=offsets)
            yield i, Tokens(np.array(ids, dtype=np.int32), spans)

    def _completions(self, rows: Sequence[Row]) -> Iterator[tuple[int, Tokens]]:
        prompts, _ = self._ids_and_offsets([row.prompt for row in rows])
        completions, _ = self._ids_and_offsets([row.completion for row in rows])
        for i, (row, prompt, completion) in enumerate(zip(rows, prompts, completions, strict=True)):
            self._look_at(row, row.prompt, row.completion)
            if not completion:
                self._findings.warn(row, "an answer is empty, so only its end token is learned")
            ids = [*self._before(prompt), *prompt]
            first = 0 if self._loss_on == "all" else len(ids)
            ids += [*completion, *self._after(row, completion)]
            yield i, Tokens(np.array(ids, dtype=np.int32), [(first, len(ids))])

    def _texts(self, rows: Sequence[Row]) -> Iterator[tuple[int, Tokens]]:
        batch = self._ids_and_offsets([row.text for row in rows])
        for i, (row, text, offsets) in enumerate(zip(rows, *batch, strict=True)):
            self._look_at(row, row.text)
            before, after = self._before(text), self._after(row, text)
            ends = [0] * len(before) + [end for _, end in offsets]
            ends += ends[-1:] * len(after)
            ids = [*before, *text, *after]
            yield i, Tokens(np.array(ids, dtype=np.int32), [(0, len(ids))], row.text, ends)

    # --- details ---

    def _before(self, ids: list[int]) -> list[int]:
        """The start tokens of the tokenizer, or none if the text already begins with them."""
        return [] if ids[: len(self._prefix)] == self._prefix else self._prefix

    def _after(self, row: Row, ids: list[int]) -> list[int]:
        """The end token, or none if the text already ends with it."""
        end = self._tokenizer.eos_token_id
        if end is None:
            self._findings.warn(row, "the tokenizer has no end token, so the model does not learn where to stop")
            return []
        return [] if ids[-1:] == [end] else [end]

    def _look_at(self, row: Row, *contents: str) -> None:
        if any(self._specials.search(content) for content in contents):
            self._findings.warn(
                row, "the content contains the text of a special token, which is tokenized as that token"
            )

    def _token_spans(
        self, row: Row, spans: Sequence[Span], *, ids: Sequence[int], offsets: Sequence[Span]
    ) -> list[Span]:
        """Convert character ranges to token ranges.

        A token that begins before an answer and ends inside it belongs to the answer, unless it is a special token: the
        offsets of a special token may include the space after it.
        """
        starts = [start for start, _ in offsets]
        result: list[Span] = []
        for start, end in spans:
            first, last = bisect_left(starts, start), bisect_left(starts, end)
            if first > 0 and offsets[first - 1][1] > start and ids[first - 1] not in self._special_ids:
                first -= 1
                self._findings.warn(row, "an answer begins inside a token that also ends its prompt")
            result.append((first, last))
        return result


def _is_empty(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls")
