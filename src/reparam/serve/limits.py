"""The sizes of an engine. All of them are set at start: left open, transformers takes most of the memory."""

from __future__ import annotations

import dataclasses

PAGE = 32
"""Tokens of a block of the cache. Prompts share whole blocks, so a shared beginning counts in steps of this."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much an engine holds at once.

    >>> Limits(requests=8).requests
    8
    """

    requests: int = 64
    """The most requests that one step computes."""
    step_tokens: int = 512
    """The most tokens that one step computes, at least `requests`. Longer prompts are divided over several steps."""
    cache_tokens: int = 16_384
    """The tokens of all requests, prompts and answers, whose keys and values are kept; a multiple of 32 is used."""
    open_requests: int = 1024
    """The most requests that are computed or wait. Further ones are refused."""
    adapter_bytes: int = 1 << 30
    """The most bytes of adapters that are ready at once. Others stay on disk, and leave least recently used first."""

    def __post_init__(self) -> None:
        """Raise ValueError for sizes with which nothing could run."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Limits: {field.name}={value!r}: expected a whole number, 1 or more")
        if self.step_tokens < self.requests:
            raise ValueError(
                f"Limits: step_tokens={self.step_tokens} is below requests={self.requests}, but each request in a step "
                f"has at least one token; raise step_tokens"
            )
        if self.cache_tokens < PAGE:
            raise ValueError(f"Limits: cache_tokens={self.cache_tokens}: expected {PAGE} or more")
