"""Tokenize texts piece by piece, and remember the tokens of the pieces that occur often, which is much faster.

Byte-level BPE first divides a text into words with a regular expression, and then each word into tokens. With the
expressions below, a word ends before a single space between two other characters that are not white space, whatever
else stands around it. So a text can be cut there: the tokens of the pieces are the tokens of the text. Pieces that have
been seen are looked up. Other pieces, and all texts of other kinds of tokenizers, go through the tokenizer.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from reparam.data.offsets import ByOffsets, Located, untrimmed, with_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The expressions of GPT-2; Llama 3 and GPT-4; Qwen 2 and 3; GPT-4o; as tokenizer.json holds them.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
EXPRESSIONS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
KNOWN = 1 << 17  # pieces that are remembered
LONGEST = 64  # characters of a piece that is remembered


class _Part(NamedTuple):
    """A part of a text: an added token, or what stands between two of them."""

    start: int  # its first character
    first: int  # the number of its first token
    words: list[str] | None  # the pieces, without the space before all but the first one; None for an added token


class ByPieces:
    """Tokens that were found piece by piece."""

    def __init__(self, pieces: Pieces, text: str, parts: Sequence[_Part], ids: np.ndarray) -> None:
        self._pieces, self._text, self._parts, self.ids = pieces, text, parts, ids
        self._ends: dict[int, np.ndarray] = {}  # the character behind each piece of a part
        self._whole: Located | None = None

    def before(self, position: int) -> tuple[int, bool]:
        """As `Located.before`."""
        number = bisect_left(self._parts, position, key=lambda part: part.start) - 1
        if number < 0:
            return 0, False
        part = self._parts[number]
        end, following = self._behind(number)
        if part.words is None:
            return part.first + 1, end > position
        if position == end and not self._text[end - 1].isspace():
            return following, False
        piece, start, first = self._piece(number, position)
        count, inside = self._pieces.located(piece).before(position - start)
        return first + count, inside

    def text_bytes(self, first: int, end: int) -> int:
        """As `Located.text_bytes`."""
        sizes = self._pieces.sizes
        if sizes is not None:
            return int(sizes[self.ids[first:end]].sum())
        if self._whole is None:
            (self._whole,) = self._pieces.with_offsets([self._text])
        return self._whole.text_bytes(first, end)

    def _behind(self, number: int) -> tuple[int, int]:
        """The character and the token behind a part."""
        if number + 1 < len(self._parts):
            return self._parts[number + 1].start, self._parts[number + 1].first
        return len(self._text), len(self.ids)

    def _piece(self, number: int, position: int) -> tuple[str, int, int]:
        """The piece of a part that ends at or behind a character: its text, its first character, its first token."""
        part, (end, following) = self._parts[number], self._behind(number)
        words = part.words or []
        if position <= part.start + len(words[0]):
            return words[0], part.start, part.first
        last = f" {words[-1]}"
        if position > end - len(last):
            return last, end - len(last), following - self._pieces.count(last)
        if number not in self._ends:
            sizes = np.fromiter(map(len, words), dtype=np.int64, count=len(words)) + 1
            self._ends[number] = part.start - 1 + np.cumsum(sizes)
        at = int(np.searchsorted(self._ends[number], position))
        first = part.first + self._pieces.count(words[0]) + sum(self._pieces.count(f" {w}") for w in words[1:at])
        return f" {words[at]}", int(self._ends[number][at - 1]), first


class _Known(dict[str, bytes]):
    """The token ids of pieces, as bytes of int32; `others` has those of pieces that are needed only for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.others: dict[str, bytes] = {}

    def __missing__(self, piece: str) -> bytes:
        return self.others[piece]


class Pieces:
    """Tokenizes texts, without adding special tokens. `of` makes it for a tokenizer that it suits."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {token.content: np.int32(number).tobytes() for number, token in added.items()}
        names = sorted(filter(None, self._added), key=len, reverse=True)
        self._between_added = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self._begin_added = {name[0] for name in names}
        self._first = _Known()  # pieces -> their token ids
        self._later = _Known()  # pieces without the space that they begin with -> their token ids
        self._located: dict[str, ByOffsets] = {}
        self.sizes = None if tokenizer.backend_tokenizer.normalizer is not None else self._sizes()
        """Number of bytes of each token, [V]; None if the tokens are those of a normalized text."""

    def _sizes(self) -> np.ndarray:
        """Each character of a token of the vocabulary stands for one byte; added tokens are written as they are."""
        names = self._tokenizer.convert_ids_to_tokens(list(range(len(self._tokenizer))))
        return np.array([len(name.encode() if name in self._added else name) for name in names], dtype=np.int64)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Pieces | None:
        """For this tokenizer; None if its texts cannot be cut at spaces for certain."""
        if not tokenizer.is_fast or getattr(tokenizer, "split_special_tokens", False):
            return None
        state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        plain = all(not (t["lstrip"] or t["rstrip"] or t["single_word"]) for t in state["added_tokens"])
        kinds = {t["normalized"] for t in state["added_tokens"]}
        one_kind = len(kinds) <= 1 and (state["normalizer"] is None or True not in kinds)
        model = state["model"]
        bpe = model["type"] == "BPE" and not model.get("dropout") and not model.get("end_of_word_suffix")
        fits = plain and one_kind and bpe and _divides_words(state) and _keeps_offsets(state["post_processor"])
        return cls(tokenizer) if fits else None

    def __call__(self, texts: Sequence[str]) -> Sequence[Located]:
        """The tokens of each text."""
        # Every second segment is an added token. Most texts hold none; looking for a character is much faster.
        segments = [
            self._between_added.split(text) if any(start in text for start in self._begin_added) else [text]
            for text in texts
        ]
        words = [[_words(plain) if plain else [] for plain in each[::2]] for each in segments]
        found = [[self._known(plain) for plain in each] for each in words]
        pairs = (pair for each in zip(words, found, strict=True) for pair in zip(*each, strict=True))
        self._learn([plain for plain, known in pairs if known is None])
        made = [self._one(*each) for each in zip(texts, segments, words, found, strict=True)]
        self._first.others, self._later.others = {}, {}
        return made

    def _one(
        self, text: str, segments: Sequence[str], words: Sequence[list[str]], known: Sequence[bytes | None]
    ) -> ByPieces:
        parts: list[_Part] = []
        found: list[bytes] = []
        start = first = 0
        for number, segment in enumerate(segments):
            if not segment:
                continue
            added = number % 2 == 1
            parts.append(_Part(start, first, None if added else words[number // 2]))
            ids = self._added[segment] if added else known[number // 2]
            found.append(ids if ids is not None else self._tokens(words[number // 2]))
            start += len(segment)
            first += len(found[-1]) // 4
        return ByPieces(self, text, parts, np.frombuffer(b"".join(found), dtype=np.int32))

    def _known(self, words: list[str]) -> bytes | None:
        """The token ids of consecutive pieces, as bytes of int32; None if one of them is not known."""
        try:
            return self._tokens(words) if words else b""
        except KeyError:
            return None

    def _tokens(self, words: list[str]) -> bytes:
        return self._first[words[0]] + b"".join(map(self._later.__getitem__, words[1:]))

    def _learn(self, texts: Sequence[list[str]]) -> None:
        """Find the token ids of the pieces of these texts that are not known."""
        heads = {words[0] for words in texts if words}
        tails: set[str] = set()  # the heads, too: that is faster than to leave them out
        tails.update(*texts)
        self._find(self._first, sorted(heads.difference(self._first)), "")
        self._find(self._later, sorted(tails.difference(self._later)), " ")

    def _find(self, known: _Known, pieces: Sequence[str], before: str) -> None:
        """Find the token ids of pieces. Short ones are known from then on, while there is room."""
        if not pieces:
            return
        found = self._plain().encode_batch_fast([before + piece for piece in pieces], add_special_tokens=False)
        for piece, each in zip(pieces, found, strict=True):
            kept = len(piece) < LONGEST and len(known) < KNOWN
            (known if kept else known.others)[piece] = array("i", each.ids).tobytes()

    def count(self, piece: str) -> int:
        """Number of tokens of a piece."""
        known, name = (self._later, piece[1:]) if piece.startswith(" ") else (self._first, piece)
        if name not in known and name not in known.others:
            self._find(known, [name], piece[: len(piece) - len(name)])
        return len(known[name]) // 4

    def located(self, piece: str) -> ByOffsets:
        """A piece with the character range of each token."""
        if piece not in self._located:
            if len(self._located) >= KNOWN // 8:
                self._located.clear()
            with untrimmed(self._tokenizer):
                found = self._plain().encode(piece, add_special_tokens=False)
            self._located[piece] = ByOffsets(piece, np.array(found.ids, dtype=np.int32), found.offsets)
        return self._located[piece]

    def with_offsets(self, texts: Sequence[str]) -> Sequence[Located]:
        """The tokens of each text, found by the tokenizer."""
        return with_offsets(self._tokenizer, texts)

    def _plain(self) -> Any:
        """The tokenizer of the library tokenizers, without truncation and padding, which other calls may have set."""
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend


def _words(text: str) -> list[str]:
    """The text, divided at every single space between two characters that are not white space."""
    words = text.split(" ")
    if "" not in words and words == list(map(str.strip, words)):
        return words
    found = words[:1]
    for word in words[1:]:
        if word and not word[0].isspace() and found[-1] and not found[-1][-1].isspace():
            found.append(word)
        else:
            found[-1] = f"{found[-1]} {word}"
    return found


def _divides_words(state: dict[str, Any]) -> bool:
    """Whether the tokenizer divides texts into words with one of EXPRESSIONS and without a space before the text."""
    if state["normalizer"] not in (None, {"type": "NFC"}):
        return False
    steps = state["pre_tokenizer"] or {"type": ""}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    if steps[-1].get("use_regex", True):
        return all(step["type"] == "Digits" for step in steps[:-1])
    split = steps[0]
    return (
        len(steps) == 2
        and split["type"] == "Split"
        and split["pattern"].get("Regex") in EXPRESSIONS
        and split["behavior"] == "Isolated"
        and not split["invert"]
    )


def _keeps_offsets(processor: dict[str, Any] | None) -> bool:
    """Whether the ranges of a piece's tokens are those in the text: the first token must not be an exception."""
    steps = [] if processor is None else processor.get("processors", [processor])
    return not any(s["type"] == "ByteLevel" and s["trim_offsets"] and s["add_prefix_space"] for s in steps)
