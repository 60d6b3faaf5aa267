"""The text of tokens that come one by one."""

from __future__ import annotations

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
