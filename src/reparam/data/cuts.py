"""Where texts can be cut so that the tokens of the pieces are the tokens of the texts.

Byte-level BPE first divides a text into words with a regular expression, and then each word into tokens. With the
expressions below, a word ends before a single space between two other characters that are not white space, whatever
else stands around it. Added tokens are divided from the text before that.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np

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
SPACE = ord(" ")
END = b"\xff"
"""A byte that UTF-8 does not have; it stands behind each text."""
_WHITE = np.zeros(256, dtype=bool)
_WHITE[[*b"\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f ", *END]] = True
_OTHER_WHITE = re.compile(
    b"\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80"
)  # the white space beyond ASCII, in UTF-8


class Cuts:
    """Cuts texts at single spaces and around the added tokens."""

    def __init__(self, added: Collection[str]) -> None:
        names = sorted((name.encode() for name in added if name), key=len, reverse=True)  # the longest one is taken
        self._added = re.compile(b"|".join(map(re.escape, names)) or b"(?!)")
        self._begins = np.zeros(256, dtype=bool)
        self._begins[[name[0] for name in names]] = True

    def __call__(self, data: bytes) -> np.ndarray:
        """The first byte of each piece of `data`, [P] int64. `data` is texts in UTF-8, each followed by `END`.

        Each `END` and each added token is a piece of its own. An added token is found as the library tokenizers finds
        it: the first one in the text, and the longest of those that begin there.
        """
        content = np.frombuffer(data, dtype=np.uint8)
        first = np.zeros(len(data) + 1, dtype=bool)  # whether a piece begins at this byte
        spaces = np.flatnonzero(content[1:-1] == SPACE) + 1
        spaces = spaces[~(_WHITE.take(content.take(spaces - 1)) | _WHITE.take(content.take(spaces + 1)))]
        first[spaces] = True
        ends = np.flatnonzero(content == END[0])
        if np.count_nonzero(content > 127) > len(ends):
            for match in _OTHER_WHITE.finditer(data):
                first[[max(match.start() - 1, 0), match.end()]] = False
        added = self._added_in(data, content)
        for begin, end in added:
            first[max(begin - 1, 0) : end + 1] = False  # nor is a space beside an added token a place to cut
        first[[0, *(place for span in added for place in span)]] = True
        first[ends] = first[ends + 1] = True
        return np.flatnonzero(first[:-1])

    def _added_in(self, data: bytes, content: np.ndarray) -> list[tuple[int, int]]:
        """The ranges of the added tokens."""
        found: list[tuple[int, int]] = []
        end = 0
        for at in np.flatnonzero(self._begins.take(content)).tolist():
            if at >= end and (match := self._added.match(data, at)):
                end = match.end()
                found.append((at, end))
        return found


def divides_words(state: dict[str, Any]) -> bool:
    """Whether a tokenizer divides texts into words with one of EXPRESSIONS and without a space before the text.

    `state` is the content of its tokenizer.json.
    """
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
