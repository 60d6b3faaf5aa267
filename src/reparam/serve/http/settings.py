"""The settings of the server: its names, keys and limits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

LOCAL = ("localhost", "127.0.0.1", "::1")
"""The names by which a server that only its own machine reaches is called."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the server takes, and from whom.

    >>> Settings("tiny-python").max_tokens
    4096
    """

    name: str
    """The name of the base, which requests give as `model`."""
    root: Path | None = None
    """The folder of the adapters. Nothing outside of it is read."""
    keys: tuple[str, ...] = ()
    """The keys of those who may use the server; without any, everybody who reaches it."""
    hosts: tuple[str, ...] | None = None
    """The names by which the server is called; None for any. Other names are those of websites that try to use a server
    on the machine of their visitor."""
    loading: bool = False
    """Whether clients may load and unload adapters."""
    max_tokens: int = 4096
    """The most tokens of one answer."""
    body_bytes: int = 1 << 20
    """The most bytes of a request."""
    body_seconds: float = 30.0
    """Seconds in which a request must have been sent."""
    seconds: float = 600.0
    """Seconds in which a request must have been answered."""
    send_seconds: float = 60.0
    """Seconds that a client may leave the stream of an answer unread, once its connection is full."""
    key_requests: int = 256
    """The most answers at once for one key; without keys, for all clients together."""
    drain_seconds: float = 30.0
    """Seconds in which open requests can end when the server stops."""

    def __post_init__(self) -> None:
        """Raise ValueError for settings with which nothing could be answered."""
        if not self.name or len(self.name) > 512 or "+" in self.name or "*" in self.name:
            raise ValueError(
                f"{self.name!r} cannot be the name of the base in requests: expected 1 to 512 characters without + and "
                f"*, which are for sums; give another one with --name"
            )
        for name in ("max_tokens", "body_bytes", "key_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a whole number, 1 or more")
        for name in ("body_seconds", "seconds", "send_seconds", "drain_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a number of seconds above 0")
