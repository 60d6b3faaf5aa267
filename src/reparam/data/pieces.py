"""Tokenize texts piece by piece, and remember the tokens of the pieces that occur often, which is much faster.

`data.cuts` says where a text can be cut so that the tokens of the pieces are its tokens. Pieces that have been seen are
looked up, all pieces of many texts at once. Other pieces go through the tokenizer, and so do all texts of other kinds
of tokenizers.

A token of byte-level BPE stands for a known number of bytes. So the tokens alone tell where each of them stands.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import pre_tokenizers

from reparam.data.cuts import END, Cuts, divides_words
from reparam.data.known import Known, Strings
from reparam.data.offsets import Located, with_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWN = 1 << 18  # pieces that are remembered
AT_ONCE = 1 << 21  # bytes of texts that are cut at once


class BySizes(NamedTuple):
    """Tokens with the number of bytes up to the end of each."""

    text: str
    ids: np.ndarray
    first: int
    """Number of bytes before the text."""
    ends: np.ndarray
    """Number of bytes up to the end of each token, from the same place as `first`, [T] int64."""

    def before(self, position: int) -> tuple[int, bool]:
        """As `Located.before`."""
        at = self.first + (position if self.text.isascii() else len(self.text[:position].encode()))
        if at == self.first or not len(self.ids):
            return 0, False
        count = min(int(self.ends.searchsorted(at)) + 1, len(self.ids))
        return count, int(self.ends[count - 1]) > at

    def text_bytes(self, first: int, end: int) -> int:
        """As `Located.text_bytes`."""
        if first >= end:
            return 0
        return int(self.ends[end - 1]) - (int(self.ends[first - 1]) if first else self.first)


class Pieces:
    """Tokenizes texts, without adding special tokens. `of` makes it for a tokenizer that it suits."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._cuts = Cuts([token.content for token in tokenizer.added_tokens_decoder.values()])
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        # Each character of a token of the vocabulary stands for one byte; added tokens are written as they are.
        self._sizes = np.array([len(n.encode() if n in added else n) if n else 0 for n in names], dtype=np.int32)
        self._known = Known(KNOWN)
        self._first = np.zeros(KNOWN + 1, dtype=np.int32)  # of each entry: the place of its tokens in `_tokens`
        self._counts = np.zeros(KNOWN + 1, dtype=np.int32)  # and their number
        self._tokens = np.zeros(1 << 16, dtype=np.int32)
        self._used = 0
        self._remember(Strings(END, np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)), [[]])

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Pieces | None:
        """For this tokenizer; None if its texts cannot be cut at spaces for certain."""
        if not tokenizer.is_fast or getattr(tokenizer, "split_special_tokens", False):
            return None
        state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        plain = all(not (t["lstrip"] or t["rstrip"] or t["single_word"]) for t in state["added_tokens"])
        kinds = {t["normalized"] for t in state["added_tokens"]}
        one_kind = len(kinds) <= 1 and (state["normalizer"] is None or True not in kinds)
        fits = plain and one_kind and _is_plain_bpe(state["model"]) and divides_words(state)
        return cls(tokenizer) if fits else None

    def __call__(self, texts: Sequence[str]) -> Sequence[Located]:
        """The tokens of each text."""
        found: list[Located] = []
        some: list[str] = []
        size = 0
        for text in texts:
            some.append(text)
            size += len(text)
            if size > AT_ONCE:
                found += self._several(some)
                some, size = [], 0
        return [*found, *self._several(some)] if some else found

    def _several(self, texts: Sequence[str]) -> Sequence[Located]:
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        if normalizer is not None:  # the tokens must be those of the text as it is
            changed = [i for i, t in enumerate(texts) if not t.isascii() and normalizer.normalize_str(t) != t]
            if changed:
                others = iter(with_offsets(self._tokenizer, [texts[i] for i in changed]))
                among = set(changed)
                same = iter(self._cut([text for i, text in enumerate(texts) if i not in among]))
                return [next(others) if i in among else next(same) for i in range(len(texts))]
        return self._cut(texts)

    def _cut(self, texts: Sequence[str]) -> list[BySizes]:
        """The tokens of texts that the tokenizer does not normalize."""
        if not texts:
            return []
        encoded = [text.encode() for text in texts]
        data = END.join([*encoded, b""])
        starts = self._cuts(data)  # [P]
        sizes = np.diff(starts, append=len(data))
        entries = self._known.find(Strings(data, starts, sizes))
        first, counts = self._first.take(entries), self._counts.take(entries)
        unknown = np.flatnonzero(entries == 0)
        if len(unknown):
            places, numbers = self._learned([data[starts[i] : starts[i] + sizes[i]] for i in unknown.tolist()])
            first[unknown], counts[unknown] = places, numbers
        ends = np.cumsum(counts, dtype=np.int64)  # [P], tokens up to the end of each piece
        ids = self._tokens.take(np.repeat(first - (ends - counts), counts) + np.arange(ends[-1]))
        until = np.cumsum(self._sizes.take(ids), dtype=np.int64)  # bytes up to the end of each token
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        behind = np.cumsum(lengths)  # bytes up to the end of each text, without END
        last = until.searchsorted(behind, side="right")
        found, start, before = [], 0, 0
        for text, end, size in zip(texts, last.tolist(), behind.tolist(), strict=True):
            found.append(BySizes(text, ids[start:end], before, until[start:end]))
            start, before = end, size
        return found

    def _learned(self, pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Find the tokens of pieces, and remember them. Returns their places in `_tokens`, and their numbers."""
        different = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
        found = self._plain().encode_batch_fast([piece.decode() for piece in different], add_special_tokens=False)
        sizes = np.fromiter(map(len, different), dtype=np.int64, count=len(different))
        strings = Strings(b"".join(different), np.cumsum(sizes) - sizes, sizes)
        places, counts = self._remember(strings, [each.ids for each in found])
        numbers = [different[piece] for piece in pieces]
        return places[numbers], counts[numbers]

    def _remember(self, strings: Strings, tokens: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Put the tokens of strings into `_tokens`: those of new entries for good, others until the next call."""
        entries = self._known.add(strings)
        order = np.argsort(entries == 0, kind="stable")  # the entries first
        flat = np.array([i for number in order.tolist() for i in tokens[number]], dtype=np.int32)
        counts = np.array([len(each) for each in tokens], dtype=np.int32)
        places = np.empty(len(tokens), dtype=np.int32)
        places[order] = self._used + np.cumsum(counts[order]) - counts[order]
        needed = self._used + len(flat)
        if needed > len(self._tokens):
            self._tokens = np.concatenate([self._tokens[: self._used], np.zeros(needed + needed // 4, dtype=np.int32)])
        self._tokens[self._used : needed] = flat
        new = entries > 0
        self._first[entries[new]], self._counts[entries[new]] = places[new], counts[new]
        self._used += int(counts[new].sum())
        return places, counts

    def _plain(self) -> Any:
        """The tokenizer of the library tokenizers, without truncation and padding, which other calls may have set."""
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend


def _is_plain_bpe(model: dict[str, Any]) -> bool:
    """Whether the tokens of the model are bytes and what is merged from them, always in the same way."""
    return (
        model["type"] == "BPE"
        and not (model.get("dropout") or model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"))
        and model["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    )
