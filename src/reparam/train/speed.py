"""Tell when a CPU computes slowly in the dtype of the base."""

from __future__ import annotations

import time

import torch
from torch import nn

SLOW = 3.0
"""A dtype that takes so many times as long as float32 is worth a note."""


def slow_dtype(model: nn.Module, precision: str) -> str | None:
    """A sentence if the model computes in 16 bits on a CPU that is slow in them, else None.

    `precision` is `run.precision`. It takes about a millisecond to measure.
    """
    parameter = next(model.parameters())
    dtype = torch.bfloat16 if precision == "bfloat16" else parameter.dtype
    if parameter.device.type != "cpu" or dtype.itemsize != 2 or not dtype.is_floating_point:
        return None
    times = min(_seconds(dtype) for _ in range(3)) / min(_seconds(torch.float32) for _ in range(3))
    if times < SLOW:
        return None
    name = str(dtype).removeprefix("torch.")
    key = "run.precision" if precision == "bfloat16" else "base.dtype"
    return (
        f"this CPU multiplies matrices in {name} about {times:.0f} times as slowly as in float32; --{key} float32 is "
        f"faster" + ("" if precision == "bfloat16" else " and takes twice the memory")
    )


@torch.no_grad()
def _seconds(dtype: torch.dtype) -> float:
    x, w = torch.ones(64, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
    start = time.process_time()
    for _ in range(2):
        nn.functional.linear(x, w)
    return time.process_time() - start
