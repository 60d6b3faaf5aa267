"""Adapters in host memory: those that had to leave a device's tables come back from here, not from disk."""

from __future__ import annotations

import dataclasses
import threading

from torch import Tensor

from reparam.core.base import Factors
from reparam.serve.proof import Proven


class Shelf:
    """The contents of adapters by digest, up to `budget` bytes; the least recently used ones leave first."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._held: dict[str, tuple[Proven, int]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def put(self, proven: Proven) -> None:
        """Keep an adapter, if it fits."""
        if not self._budget:
            return
        contents = {path: (_moved(own), _to_host(bias)) for path, (own, bias) in proven.contents.items()}
        size = sum(t.nbytes for own, bias in contents.values() for t in (*(own or ()), bias) if t is not None)
        with self._lock:
            self._held.pop(proven.digest, None)
            if size > self._budget:
                return
            while size + sum(each for _, each in self._held.values()) > self._budget:
                del self._held[next(iter(self._held))]
            self._held[proven.digest] = dataclasses.replace(proven, contents=contents), size

    def get(self, digest: str) -> Proven | None:
        """An adapter, or None if it is not here."""
        with self._lock:
            if digest not in self._held:
                return None
            self._held[digest] = self._held.pop(digest)
            return self._held[digest][0]


def _moved(factors: Factors | None) -> Factors | None:
    return factors and Factors(*map(_to_host, factors))  # type: ignore[arg-type]


def _to_host(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu().clone()
