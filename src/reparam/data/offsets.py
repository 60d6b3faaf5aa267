"""The tokens of a text, with the characters that each stands for."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Located(Protocol):
    """The tokens of a text, and where they stand in it."""

    @property
    def ids(self) -> np.ndarray:
        """Token ids, [T] int32."""

    def before(self, position: int) -> tuple[int, bool]:
        """Number of tokens that begin before a character, and whether the last of them ends behind its start."""

    def text_bytes(self, first: int, end: int) -> int:
        """UTF-8 bytes of the text of the tokens first ... end - 1."""


class ByOffsets(NamedTuple):
    """Tokens with the character range of each."""

    text: str
    ids: np.ndarray
    offsets: Sequence[tuple[int, int]]

    def before(self, position: int) -> tuple[int, bool]:
        """As `Located.before`."""
        count = bisect_left(self.offsets, position, key=lambda pair: pair[0])
        return count, count > 0 and self.offsets[count - 1][1] > position

    def text_bytes(self, first: int, end: int) -> int:
        """As `Located.text_bytes`."""
        start = self.offsets[first - 1][1] if first else 0
        return len(self.text[start : self.offsets[end - 1][1]].encode()) if first < end else 0


def with_offsets(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Sequence[Located]:
    """The tokens of each text with the character range of each token; no special tokens are added."""
    if not texts:
        return []
    with untrimmed(tokenizer):
        batch = tokenizer(
            list(texts),
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,  # do not warn of rows longer than the model's limit; they are truncated or split later
        )
    found = zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True)
    return [ByOffsets(text, np.array(ids, dtype=np.int32), offsets) for text, ids, offsets in found]


@contextmanager
def untrimmed(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Let the range of a token include its spaces, which the post-processors of GPT-2 and RoBERTa leave out.

    A token that is a space alone would have an empty range at the next character, and would belong to what begins
    there.
    """
    from tokenizers.processors import ByteLevel

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    before = getattr(backend, "post_processor", None)
    if before is None:
        yield
        return
    backend.post_processor = ByteLevel(trim_offsets=False)  # without special tokens, it changes nothing else
    try:
        yield
    finally:
        backend.post_processor = before
