"""Count the bytes of all live tensors while a program runs, and what they are for when they are most."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.hooks import RemovableHandle


class Live(TorchDispatchMode):
    """A context that follows every storage that an operation makes, until it is freed.

    `peak` is the largest number of bytes that were live at once, and `parts` what they were for then. A new storage is
    for `phase`, unless its last dimension has `vocabulary` entries: then it is for "logits".
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.phase = "activations"
        self.peak = 0
        self.parts: Counter[str] = Counter()
        self._vocabulary = vocabulary
        self._now: Counter[str] = Counter()
        self._held: dict[int, tuple[int, str, weakref.ref[Any]]] = {}

    def hold(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count these tensors, which exist already, or give those that are counted another purpose."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._held:
                size, before, reference = self._held[key]
                self._now[before] -= size
                self._now[part] += size
                self._held[key] = (size, part, reference)
            else:
                self._add(tensor, part)

    def gradient(self, parameter: Tensor) -> RemovableHandle:
        """Count the gradient of a parameter as one, once it is there, until the handle is removed."""
        return parameter.register_post_accumulate_grad_hook(lambda p: self.hold([p.grad], "gradients"))

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """New storages are for `phase` inside the block."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for each in tree_iter(found):
            if isinstance(each, Tensor):
                self._add(each, None)
        return found

    def _add(self, tensor: Tensor, part: str | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        if part is None:
            wide = tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary
            part = "logits" if wide and self.phase == "activations" else self.phase
        size = storage.nbytes()
        self._held[key] = (size, part, weakref.ref(storage, lambda _: self._gone(key)))
        self._now[part] += size
        if (total := sum(self._now.values())) > self.peak:
            self.peak, self.parts = total, Counter(self._now)

    def _gone(self, key: int) -> None:
        size, part, _ = self._held.pop(key)
        self._now[part] -= size
