"""Tokenize rows and decide which tokens carry loss. By kind of row:

- chat: the answers, each with the token that ends its turn (`data.chat` finds them in the rendered text).
- completion: the completion and the end token. Prompt and completion are tokenized separately, so that no token spans
  the boundary, and the prompt has the same ids as in generation.
- text: all tokens, including the end token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from reparam.data.answers import Rendered, Span
from reparam.data.chat import ChatTemplate, LossOn, special_names, special_tokens
from reparam.data.findings import Found
from reparam.data.offsets import Located, with_offsets
from reparam.data.pieces import Pieces
from reparam.data.row import Row
from reparam.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NOTHING = np.zeros(0, dtype=np.int32)


class Text(NamedTuple):
    """The tokens of the content of a text row."""

    tokens: Located
    before: int
    """Number of tokens that were added before those of the content."""

    def text_bytes(self, start: int, end: int) -> int:
        """UTF-8 bytes of the content that the tokens in this range, but for the first one, represent."""
        first, last = max(start + 1 - self.before, 0), min(end - self.before, len(self.tokens.ids))
        return self.tokens.text_bytes(first, last)


class Tokens(NamedTuple):
    """A tokenized row."""

    ids: np.ndarray
    """Token ids, [T] int32."""
    spans: list[Span]
    """Token ranges [start, end) that carry loss, ascending."""
    text: Text | None = None
    """For a text row: the tokens of its content."""


class Tokenizer:
    """Tokenizes rows in batches. Needs a fast tokenizer, and a chat template if there are chats.

    Completion and text rows get the tokens that the tokenizer puts at the start of a sequence and its end token, unless
    the row already contains them. Chats get only the special tokens of their template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, loss_on: LossOn) -> None:
        self._tokenizer = tokenizer
        self._found = Found((), vocab_size=None, bad_rows="error")
        self._loss_on: LossOn = loss_on
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        self._pieces = Pieces.of(tokenizer)
        self._specials = special_tokens(tokenizer)
        # Looking for one character is much faster than looking for the tokens.
        self._begin_special = {token[0] for token in special_names(tokenizer)}
        self._special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        probe = tokenizer("a", return_special_tokens_mask=True)
        leading = len(list(takewhile(bool, probe["special_tokens_mask"])))
        self._prefix = np.array(probe["input_ids"][:leading], dtype=np.int32)
        end = tokenizer.eos_token_id
        self._end = None if end is None else np.array([end], dtype=np.int32)

    def __call__(self, rows: Sequence[Row], found: Found) -> list[tuple[int, Tokens]]:
        """Tokenize rows: their texts, each with the number of its row, in order.

        Leaves out rows that are refused, and records them in `found`. A chat comes several times if its template makes
        it one text for each answer.
        """
        self._found = found
        done: list[tuple[int, Tokens]] = []  # (position in `rows`, tokens)
        for kind, tokenize in (("chat", self._chats), ("completion", self._completions), ("text", self._texts)):
            chosen = [i for i, row in enumerate(rows) if row.kind == kind]
            if chosen:
                done += [(chosen[i], tokens) for i, tokens in tokenize([rows[i] for i in chosen])]
        return sorted(done, key=lambda pair: pair[0])

    def uses(self) -> dict[str, bool]:
        """Whether keys of messages and of chats changed the text of a row, since the last call."""
        return self._template.uses() if self._template else {}

    def _located(self, texts: Sequence[str]) -> Sequence[Located]:
        """The tokens of each text, without added special tokens."""
        if self._pieces is not None:
            return self._pieces(texts)
        return with_offsets(self._tokenizer, texts)

    # --- the three kinds of rows; each yields (position in `rows`, tokens) ---

    def _chats(self, rows: Sequence[Row]) -> Iterator[tuple[int, Tokens]]:
        assert self._template is not None
        chats: list[tuple[int, Rendered]] = []
        plain = [i for i, row in enumerate(rows) if not row.variables]
        try:
            found = self._template.render_plain([rows[i].messages for i in plain], loss_on=self._loss_on)
        except DataError as error:
            raise DataError([f"{rows[plain[0]].source}: {error}"]) from error
        done = {plain[number]: rendered for number, rendered in found.items()}
        for i, row in enumerate(rows):
            if i not in done:  # the contents of the others hold no special token
                self._look_at(row, *(message["content"] for message in row.messages))
            if any(_is_empty(message) for message in row.messages):
                self._found.warn(row, "an answer is empty, so only its end token is learned")
            try:
                rendered = done.get(i) or self._template.render(
                    row.messages, loss_on=self._loss_on, variables=row.variables
                )
            except DataError as error:
                raise DataError([f"{row.source}: {error}"]) from error
            except ValueError as error:
                self._found.refuse(row, str(error))
                continue
            chats += [(i, part) for part in rendered]
            for warning in dict.fromkeys(warning for part in rendered for warning in part.warnings):
                self._found.warn(row, warning)
        for (i, chat), tokens in zip(chats, self._located([chat.text for _, chat in chats]), strict=True):
            yield i, Tokens(tokens.ids, self._token_spans(rows[i], chat.spans, tokens))

    def _completions(self, rows: Sequence[Row]) -> Iterator[tuple[int, Tokens]]:
        prompts = [tokens.ids for tokens in self._located([row.prompt for row in rows])]
        completions = [tokens.ids for tokens in self._located([row.completion for row in rows])]
        begun = self._may_hold_special([text for row in rows for text in (row.prompt, row.completion)])
        for i, (row, prompt, completion) in enumerate(zip(rows, prompts, completions, strict=True)):
            if begun:
                self._look_at(row, row.prompt, row.completion)
            if not len(completion):
                self._found.warn(row, "an answer is empty, so only its end token is learned")
            before = self._before(prompt)
            first = 0 if self._loss_on == "all" else len(before) + len(prompt)
            ids = np.concatenate([before, prompt, completion, self._after(row, completion)])
            yield i, Tokens(ids, [(first, len(ids))])

    def _texts(self, rows: Sequence[Row]) -> Iterator[tuple[int, Tokens]]:
        begun = self._may_hold_special([row.text for row in rows])
        for i, (row, text) in enumerate(zip(rows, self._located([row.text for row in rows]), strict=True)):
            if begun:
                self._look_at(row, row.text)
            before = self._before(text.ids)
            ids = np.concatenate([before, text.ids, self._after(row, text.ids)])
            yield i, Tokens(ids, [(0, len(ids))], Text(text, len(before)))

    # --- details ---

    def _before(self, ids: np.ndarray) -> np.ndarray:
        """The start tokens of the tokenizer, or none if the text already begins with them."""
        if not len(self._prefix) or np.array_equal(ids[: len(self._prefix)], self._prefix):
            return _NOTHING
        return self._prefix

    def _after(self, row: Row, ids: np.ndarray) -> np.ndarray:
        """The end token, or none if the text already ends with it."""
        if self._end is None:
            self._found.warn(row, "the tokenizer has no end token, so the model does not learn where to stop")
            return _NOTHING
        return _NOTHING if len(ids) and ids[-1] == self._end[0] else self._end

    def _may_hold_special(self, contents: Sequence[str]) -> bool:
        """Whether a content holds a character with which a special token begins."""
        joined = "".join(contents)
        return any(first in joined for first in self._begin_special)

    def _look_at(self, row: Row, *contents: str) -> None:
        begin = [content for content in contents if any(first in content for first in self._begin_special)]
        if any(self._specials.search(content) for content in begin):
            self._found.warn(row, "the content contains the text of a special token, which is tokenized as that token")

    def _token_spans(self, row: Row, spans: Sequence[Span], tokens: Located) -> list[Span]:
        """Convert character ranges to token ranges.

        A token that begins before an answer and ends inside it belongs to the answer, unless it is a special token: the
        offsets of a special token may include the space after it.
        """
        result: list[Span] = []
        for start, end in spans:
            (first, inside), (last, _) = tokens.before(start), tokens.before(end)
            if inside and int(tokens.ids[first - 1]) not in self._special_ids:
                first -= 1
                self._found.warn(row, "an answer begins inside a token that also ends its prompt")
            result.append((first, last))
        return result


def _is_empty(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls")
