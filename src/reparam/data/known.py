"""A table of short byte strings, in which many are looked up at once.

A string is kept as its size and `WORDS` numbers of 64 bits, which are compared as a whole: what is found is right,
whatever the hash. Shapes: P strings that are looked up.
"""

from __future__ import annotations

import numpy as np

WORDS = 6
LONGEST = 8 * WORDS  # bytes of a string that is kept
BITS = 19  # the table has 2**BITS places
TRIES = 32  # places that are looked at for one string
_FACTORS = [np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)]  # odd, of random bits
_KEPT = np.array([(1 << 8 * size) - 1 for size in range(9)], dtype=np.uint64)  # masks of the first bytes of a number


class Strings:
    """Byte strings within a text."""

    def __init__(self, data: bytes, starts: np.ndarray, sizes: np.ndarray) -> None:
        """`starts` and `sizes`, [P] int64, are in bytes of `data`. Of longer strings, only LONGEST bytes are read."""
        everywhere = np.ndarray((len(data),), dtype="<u8", buffer=data + bytes(8), strides=(1,))  # the 8 bytes at each
        self.sizes = sizes
        self.words = [everywhere.take(starts) & _KEPT.take(np.minimum(sizes, 8))]
        hashed = (self.words[0] + sizes.astype(np.uint64) * _FACTORS[1]) * _FACTORS[0]
        for number in range(1, WORDS):
            longer = np.flatnonzero(sizes > 8 * number)
            word = np.zeros(len(sizes), dtype=np.uint64)
            if len(longer):
                rest = np.minimum(sizes.take(longer) - 8 * number, 8)
                word[longer] = everywhere.take(starts.take(longer) + 8 * number) & _KEPT.take(rest)
                mixed = hashed.take(longer)
                hashed[longer] = (mixed ^ (mixed >> np.uint64(29)) ^ word.take(longer)) * _FACTORS[2]
            self.words.append(word)
        hashed ^= hashed >> np.uint64(32)
        self.places = ((hashed * _FACTORS[0]) >> np.uint64(64 - BITS)).astype(np.int64)


class Known:
    """The table. Its entries are numbered from 1."""

    def __init__(self, room: int) -> None:
        """`room` is the largest number of entries; the table is quick while this is at most half of its places."""
        self._places = np.zeros(1 << BITS, dtype=np.int32)  # numbers of entries; 0 is none
        self._sizes = np.full(room + 1, -1, dtype=np.int64)
        self._words = np.zeros((WORDS, room + 1), dtype=np.uint64)
        self._count = 0

    def find(self, strings: Strings) -> np.ndarray:
        """The entry of each string, or 0, [P] int32."""
        found = self._places.take(strings.places)
        right = self._equal(strings, np.arange(len(found)), found)
        wrong = np.flatnonzero(~right)
        for step in range(1, TRIES + 1):
            others = wrong[found.take(wrong) != 0]
            found[wrong] = 0
            if not len(others) or step == TRIES:
                break
            entries = self._places.take((strings.places.take(others) + step) & ((1 << BITS) - 1))
            found[others] = entries
            wrong = others[~self._equal(strings, others, entries)]
        return found

    def add(self, strings: Strings) -> np.ndarray:
        """Add strings, which differ from each other and from those of the table. Returns their entries, [P] int32.

        An entry is 0 if there is no room, or if the string is longer than LONGEST.
        """
        made = np.zeros(len(strings.sizes), dtype=np.int32)
        for string in np.flatnonzero(strings.sizes <= LONGEST).tolist():
            if self._count + 1 == len(self._sizes):
                break
            first = int(strings.places[string])
            tried = ((first + step) & ((1 << BITS) - 1) for step in range(TRIES))
            place = next((place for place in tried if not self._places[place]), None)
            if place is not None:
                self._count += 1
                self._places[place] = made[string] = self._count
        new = np.flatnonzero(made)
        self._sizes[made[new]] = strings.sizes[new]
        for number, word in enumerate(strings.words):
            self._words[number, made[new]] = word[new]
        return made

    def _equal(self, strings: Strings, chosen: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """Whether each of the chosen strings is the one of its entry, bool."""
        sizes = strings.sizes.take(chosen)
        right = self._sizes.take(entries) == sizes
        right &= self._words[0].take(entries) == strings.words[0].take(chosen)
        for number in range(1, WORDS):
            longer = np.flatnonzero(right & (sizes > 8 * number))
            if not len(longer):
                break
            theirs = strings.words[number].take(chosen.take(longer))
            right[longer] = self._words[number].take(entries.take(longer)) == theirs
        return right
