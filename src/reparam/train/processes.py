"""Several processes of one run, as torchrun starts them: their number, and work that one of them does for all.

All processes train, each on its own rows. The first one alone locks the run folder, writes, scores and prints. Where
the processes meet, an error in any of them ends all: the first process raises it, and the others exit with code 1.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")
_PATIENCE = datetime.timedelta(days=1)  # the others wait while the first process scores and saves


def count() -> int:
    """Number of processes of this run; 1 unless a launcher started several."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """Number of this process in the run, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def connect() -> None:
    """Connect the processes of the run: with gloo on CPUs, else with the backend of the accelerator."""
    if count() > 1:
        import torch  # here and below: the command line asks for the number of processes before it imports torch
        from accelerate import PartialState

        PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)


def together(work: Callable[[], _T]) -> _T:
    """Do the work in every process, and go on when it is done in all of them.

    If it fails in any process, the first one raises its own error, or a RuntimeError with that of another process.
    """
    if count() == 1:
        return work()
    found: list[_T] = []
    error: Exception | None = None
    try:
        found.append(work())
    except Exception as raised:
        error = raised
    told = all_of(None if error is None else str(error) or type(error).__name__)
    failed = [(number, text) for number, text in enumerate(told) if text is not None]
    if not failed:
        return found[0]
    if error is None:
        error = RuntimeError(f"process {failed[0][0]} of {count()}: {failed[0][1]}")
    raise for_user(error)


def first(work: Callable[[], _T]) -> _T:
    """Do the work in the first process, while the others wait. Returns its result in all of them."""
    if count() == 1:
        return work()
    found: list[_T] = []
    error: Exception | None = None
    if rank() == 0:
        try:
            found.append(work())
        except Exception as raised:
            error = raised
    from accelerate.utils import broadcast_object_list

    outcome = [found]
    broadcast_object_list(outcome)
    if outcome[0]:
        return outcome[0][0]
    raise for_user(error if error is not None else RuntimeError("the first process failed"))


def all_of(value: _T) -> list[_T]:
    """The values of all processes, in their order."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    found: list[_T] = gather_object([value])
    return found


def for_user(error: Exception) -> BaseException:
    """The error in the first process; in the others, an exit without a message."""
    return error if rank() == 0 else SystemExit(1)
