"""The sizes of an engine. All of them are set at start: left open, transformers takes most of the memory."""

from __future__ import annotations

import dataclasses

import torch

PAGE = 32
"""Tokens of a block of the cache. Prompts share whole blocks, so a shared beginning counts in steps of this."""

HOST = 4 << 30
"""The default of `host_bytes` for devices."""


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
    """The most bytes of adapters that are ready at once. The least recently used ones leave first."""
    host_bytes: int | None = None
    """The most bytes of adapters in host memory, from where those that have left come back faster than from disk. None
    is 4 GiB for a model on a device, and 0 on a CPU, where it is the same memory: raise `adapter_bytes` there."""

    def host_bytes_for(self, device: torch.device) -> int:
        """The most bytes of adapters in host memory, for a model on this device."""
        if self.host_bytes is not None:
            return self.host_bytes
        return 0 if device.type == "cpu" else HOST

    def __post_init__(self) -> None:
        """Raise ValueError for sizes with which nothing could run."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "host_bytes" else 1
            if value is None and field.name == "host_bytes":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Limits: {field.name}={value!r}: expected a whole number, {least} or more")
        if self.step_tokens < self.requests:
            raise ValueError(
                f"Limits: step_tokens={self.step_tokens} is below requests={self.requests}, but each request in a step "
                f"has at least one token; raise step_tokens"
            )
        if self.cache_tokens < PAGE:
            raise ValueError(f"Limits: cache_tokens={self.cache_tokens}: expected {PAGE} or more")
