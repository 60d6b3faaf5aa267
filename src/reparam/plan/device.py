"""What the device has: its memory, and how many operations a second it does in matrix products."""

from __future__ import annotations

import re
import time

import torch

from reparam.core.memory import physical_memory
from reparam.errors import ConfigError

CONTEXT = 600 * 2**20
"""Bytes that CUDA and its libraries take for themselves; an estimate, not measured."""
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory() -> tuple[str, int | None]:
    """The device on which a run would train, and its memory in bytes; None if it is unknown."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] - CONTEXT
    return "this machine's memory", physical_memory()


def bytes_of(text: str) -> int:
    """Parse an amount of memory. Raises ConfigError for anything else.

    >>> bytes_of("24GiB"), bytes_of("80G"), bytes_of("1.5 GiB"), bytes_of("1000")
    (25769803776, 85899345920, 1610612736, 1000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--memory {text!r}: expected an amount of memory above 0, such as 24GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def speed(seconds: float = 1.0) -> float:
    """Floating-point operations a second in matrix products on this device, measured for about `seconds`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = 8192 if device == "cuda" else 512
    one, other = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    done, begin = 0, time.perf_counter()
    while True:
        product = one @ other
        float(product[0, 0])  # waits for the device
        done += 1
        if (passed := time.perf_counter() - begin) >= seconds:
            return 2 * size**3 * done / passed
