"""transformers' progress bars, shown as waits of reparam."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers.utils.logging import set_tqdm_hook

from reparam.core.progress import heard, waiting


class _Bar:
    """Stands in for tqdm: passes the advance of a bar on to a wait."""

    def __init__(self, iterable: Any = None, desc: str | None = None, total: float | None = None, **more: Any) -> None:
        self.iterable = iterable
        self.total = total if total is not None or not hasattr(iterable, "__len__") else len(iterable)
        self._held = ExitStack()
        what = (desc or "loading").lower()
        self._advance: Callable[[int], None] = self._held.enter_context(
            waiting(what, None if self.total is None else int(self.total))
        )

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def update(self, count: float = 1) -> None:
        """Advance the bar."""
        self._advance(int(count))

    def close(self) -> None:
        """Remove the bar."""
        self._held.close()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values, **settings: None  # set_description, set_postfix, refresh and others of tqdm


@contextmanager
def waits_of_transformers() -> Iterator[None]:
    """Show transformers' bars inside the block as waits, if anybody listens."""
    if not heard():
        yield
        return
    before = set_tqdm_hook(lambda factory, values, settings: _Bar(*values, **settings))
    try:
        yield
    finally:
        set_tqdm_hook(before)
