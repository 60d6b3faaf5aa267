"""Recognize a lack of memory: torch, numpy and Python report it as different errors, with different words."""

from __future__ import annotations

import errno
import os
import re

import torch

from reparam.core.text import sized

_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
_AMOUNT = re.compile(r"(?:allocate|requested)\s+(\d[\d.,]*\s*(?:bytes|[kmgt]i?b)\b)", re.IGNORECASE)


def physical_memory() -> int | None:
    """The memory of the machine in bytes; None where the operating system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def lacks_memory(error: BaseException) -> bool:
    """Whether the error means that a device or the machine has not enough memory.

    >>> lacks_memory(MemoryError()), lacks_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def memory_sentence(error: BaseException) -> str:
    """What was asked for, if the error says it, and the settings that lower it; or, in their place, the error's notes.

    >>> memory_sentence(MemoryError())[:40]
    'not enough memory; lower the batch size '
    """
    found = _AMOUNT.search(str(error))
    where = " on the GPU" if isinstance(error, torch.OutOfMemoryError) else ""
    asked = f" for another {_sized(found[1])}" if found else ""
    if notes := getattr(error, "__notes__", ()):
        return f"not enough memory{where}{asked}; {'; '.join(notes)}"
    return (
        f"not enough memory{where}{asked}; lower the batch size or max_length, keep the base in the storage nf4, or, "
        "when training, set run.gradient_checkpointing"
    )


def _sized(text: str) -> str:
    """An amount of memory; a plain number of bytes gets a unit."""
    digits, _, unit = text.partition(" ")
    if unit.lower() != "bytes" or not digits.isdigit():
        return text
    return sized(int(digits))
