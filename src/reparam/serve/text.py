"""The text of tokens that come one by one, and where it stops."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class Decoder:
    """What each token of an answer adds to its text. Without a tokenizer, nothing."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer: Any = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._sent = 0

    def add(self, token: int) -> str:
        """What the token adds; empty while a character is not complete."""
        if self._tokenizer is None:
            return ""
        if self._fast is not None:
            return self._stream.step(self._fast, token) or ""
        self._ids.append(token)  # a tokenizer in Python decodes all tokens again
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self._sent = text[self._sent :], len(text)
        return new


class Writer:
    """The text of an answer, up to the first token or text that stops it.

    The end of the text is held back while it could be the beginning of a text that stops it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, tokens: Collection[int], texts: Sequence[str]
    ) -> None:
        self._decoder = Decoder(tokenizer)
        self._tokens = tokens
        self._texts = texts
        self._held = ""
        self.stopped = False
        """Whether the answer has come to a token or text that stops it."""

    def add(self, token: int, *, last: bool) -> str:
        """What a token adds to the text, and what was held back; all of it, if this is the last token."""
        self.stopped = token in self._tokens
        text = self._held if self.stopped else self._held + self._decoder.add(token)
        found = [at for at in map(text.find, self._texts) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = 0 if self.stopped or last else beginning(text, self._texts)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def beginning(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text are the beginning of one of these.

    >>> beginning("x = 1\\n", ["\\n\\n", "def"]), beginning("x = de", ["\\n\\n", "def"]), beginning("x", ["def"])
    (1, 2, 0)
    """
    longest = max((len(stop) for stop in stops), default=0)
    for count in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0
