"""Who may use the server: keys from a file or the environment, never from the command line, which all users can read.

A key is compared as a whole and in constant time, so that the time of an answer tells nothing about it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from reparam.serve.http.errors import Problem

VARIABLE = "REPARAM_API_KEY"
SHORTEST = 16
"""Characters of a key. Shorter ones can be guessed."""


class Keys:
    """The keys that the server takes. Only their hashes are kept."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def owner(self, header: str | None) -> str:
        """An identifier of the key in an Authorization header; "" if the server has no keys.

        Raises Problem 401 if the server has keys, and this is none of them.
        """
        if not self._hashes:
            return ""
        kind, _, key = (header or "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(given, held) for held in self._hashes]  # all of them, found or not
        if kind.lower() != "bearer" or not any(matches):
            said = "is missing" if header is None else "is not right"
            raise Problem(401, f"the key {said}; send the header Authorization: Bearer KEY", code="invalid_api_key")
        return given.hex()


class Gate:
    """Counts the open answers of each owner of a key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._open)

    @contextmanager
    def open(self, owner: str, count: int) -> Iterator[None]:
        """So many answers are open inside the block.

        Raises Problem 429 if the owner has too many others open, and 400 for more than the owner may ever have.
        """
        if count > self._most:
            raise Problem(
                400,
                f"the request asks for {count} answers, prompts times n, and the server takes at most {self._most} for "
                f"one key; ask for fewer",
                param="n",
            )
        if self._open[owner] + count > self._most:
            raise Problem(
                429,
                f"{self._open[owner]} answers are open for this key and the request asks for {count}, together more "
                f"than {self._most}; send it again when some have ended",
                code="too_many_requests",
                retry=1,
            )
        self._open[owner] += count
        try:
            yield
        finally:
            self._open[owner] -= count
            if not self._open[owner]:
                del self._open[owner]


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys in a file, one in each line, and in the environment variable REPARAM_API_KEY.

    Empty lines of the file, and lines that begin with "#", are none. Warns if others can read the file. Raises
    ValueError for a file without a key, and for a key that is short or has other characters than printable ASCII.
    """
    found: list[tuple[str, str]] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: no keys can be read from it: {error}") from None
        found = [
            (line.strip(), f"{file}, line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
        if not found:
            raise ValueError(f"{file}: holds no key; write one into each line")
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            warnings.warn(f"{file}: other users of this machine can read the keys; run chmod 600 {file}", stacklevel=2)
    if VARIABLE in environment:
        found.append((environment[VARIABLE].strip(), f"the environment variable {VARIABLE}"))
    for key, place in found:
        if len(key) < SHORTEST or not all("!" <= letter <= "~" for letter in key):
            raise ValueError(
                f"{place}: a key has at least {SHORTEST} characters, all of them printable ASCII without spaces; make "
                f"one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
            )
    return tuple(dict.fromkeys(key for key, _ in found))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on this host.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_host(host: str, keys: Sequence[str]) -> None:
    """Raise ValueError for a host that other machines reach, without a key."""
    if not keys and not is_loopback(host):
        raise ValueError(
            f"--host {host}: other machines could use the server, so it needs a key; write one into a file for "
            f"--api-key-file, or into the environment variable {VARIABLE}"
        )
