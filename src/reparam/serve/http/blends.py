"""Sums of adapters that a request asks for, such as `a+0.5*b`, where the sum is exact.

A sum is made once, of the contents that its parts have at that time, and is an adapter of the engine from then on. A
part that gets new contents gives a new sum.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from reparam.combine.blend import blend
from reparam.errors import FormatError
from reparam.io import files
from reparam.io.files import adapter_folder
from reparam.serve.engine import Engine
from reparam.serve.http.errors import Problem
from reparam.serve.proof import digest

PARTS = 8
"""The most adapters in a sum; its rank is the sum of their ranks."""
KEPT = 32
"""Sums that are kept, the least recently used is forgotten first."""
EXACT = 1e-5
"""The largest relative error of a sum that counts as exact: that of rounding to float32."""
HEAVIEST = 1000.0
OWN = re.compile(r"sum-[0-9a-f]{64}")
"""The names that the engine knows sums by."""
TERM = re.compile(r"(?:([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\*)?([A-Za-z0-9][A-Za-z0-9._-]{0,127})")


def is_made(name: str) -> bool:
    """Whether the engine has a sum by this name. Adapters of users cannot be loaded by such a name."""
    return OWN.fullmatch(name) is not None


def is_sum(model: str) -> bool:
    """Whether the name of a model asks for a sum. Names of adapters have none of these characters.

    >>> is_sum("a+0.5*b"), is_sum("a-b")
    (True, False)
    """
    return "+" in model or "*" in model


def terms(model: str) -> dict[str, float]:
    """The weight of each adapter in a sum. Raises Problem 400 for what is no sum.

    >>> terms("a + 0.5*b + a")
    {'a': 2.0, 'b': 0.5}
    """
    found: dict[str, float] = {}
    for part in model.replace(" ", "").split("+"):
        match = TERM.fullmatch(part)
        if match is None:
            raise _refused("expected names of adapters with weights, such as a+0.5*b")
        found[match[2]] = found.get(match[2], 0.0) + float(match[1] or 1)
    if len(found) > PARTS:
        raise _refused(f"a sum has at most {PARTS} adapters, and this one has {len(found)}")
    for name, weight in found.items():
        if weight == 0 or not abs(weight) <= HEAVIEST:
            raise _refused(
                f"the weight of {name} is {weight:g}; expected a number from -{HEAVIEST:g} to {HEAVIEST:g} but 0"
            )
    return found


class Blends:
    """The sums that the engine has as adapters. `folder_of` gives the folder of an adapter."""

    def __init__(self, engine: Engine, folder_of: Callable[[str], Path]) -> None:
        self._engine = engine
        self._folder_of = folder_of
        self._made: OrderedDict[str, None] = OrderedDict()
        self._lock = asyncio.Lock()
        self._place = tempfile.TemporaryDirectory(prefix="reparam-sums-")

    async def find(self, weights: Mapping[str, float]) -> str:
        """The engine's name of the sum with these weights, which is made if it is not there.

        Raises Problem 400 if the adapters cannot be summed exactly, and UnknownAdapter if one of them is not there.
        """
        digests = {name: (await self._engine.look(name)).digest for name in weights}
        if list(weights.values()) == [1.0]:
            return next(iter(weights))
        parts = sorted((name, weight, digests[name]) for name, weight in weights.items())
        name = "sum-" + hashlib.sha256(repr(parts).encode()).hexdigest()
        async with self._lock:
            if name not in self._made:
                await asyncio.to_thread(self._make, name, weights, digests)
                self._made[name] = None
            self._made.move_to_end(name)
            while len(self._made) > KEPT:
                self._forget(next(iter(self._made)))
        return name

    def close(self) -> None:
        """Delete the files of all sums."""
        self._place.cleanup()

    def _make(self, name: str, weights: Mapping[str, float], digests: Mapping[str, str]) -> None:
        folder = Path(self._place.name) / name
        records = []
        for part in weights:
            records.append(files.read(adapter_folder(self._folder_of(part))))
            if digest(records[-1]) != digests[part]:
                raise Problem(
                    409, f"the files of {part} are not those that were loaded; load {part} again", param="model"
                )
        try:
            made = blend(records, list(weights.values()))
        except FormatError as error:
            names = list(weights)
            told = re.sub(r"\badapter (\d+)\b", lambda found: names[int(found[1]) - 1], str(error))
            raise _refused(f"these adapters have no exact sum: {told.partition('; space ')[0]}") from None
        except ValueError as error:
            raise _refused(str(error)) from None
        if made.error > EXACT:
            raise _refused(f"the sum has a relative error of {made.error:.2g}, so it is not exact")
        if made.idle:
            raise _refused("the sum changes nothing, because its parts cancel; give other weights")
        try:
            made.save(folder)
            self._engine.load(name, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _forget(self, name: str) -> None:
        del self._made[name]
        self._engine.unload(name)
        shutil.rmtree(Path(self._place.name) / name, ignore_errors=True)


def _refused(why: str) -> Problem:
    return Problem(400, f"model: {why}", code="no_exact_sum", param="model")
