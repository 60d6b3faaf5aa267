"""Encode batches of rows in several processes. What comes out is the same as in one, in the same order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain

from reparam.data.encoder import Encoder, Made
from reparam.data.row import Row
from reparam.errors import DataError, WorkerLost

MOST = 4  # processes that are used without being asked for
ALONE = 1 << 23  # characters that are encoded in this process before others are started without being asked for
AHEAD = 2  # batches for each process that wait or are worked on
START = "fork" if sys.platform == "linux" else "spawn"  # a fork has all modules and the tokenizer at once

_encode: Encoder | None = None  # of a worker


def usable() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encoded(
    batches: Iterable[list[Row]], make: Callable[[], Encoder], workers: int | None
) -> Generator[tuple[list[Row], Made]]:
    """The batches, each with what is made of it, in order. `make` makes the encoder, in each process that encodes.

    `workers` is the number of processes. With None, it is the number of cores, at most 4, but further ones are started
    only after the first `ALONE` characters.

    Raises what `batches` and the encoder raise, in the order of the rows, and WorkerLost if a process ends early.
    """
    remaining = iter(batches)
    if workers is None or workers == 1:
        encode, characters = make(), 0
        count = 1 if workers == 1 else min(MOST, usable())
        for batch in remaining:
            yield batch, encode(batch)
            characters += sum(row.characters for row in batch) if count > 1 else 0
            if characters > ALONE:
                break
        else:
            return
        workers = count
    first = next(remaining, None)
    if first is not None:
        yield from _in_processes(chain([first], remaining), make, workers)


def _in_processes(
    batches: Iterator[list[Row]], make: Callable[[], Encoder], workers: int
) -> Generator[tuple[list[Row], Made]]:
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(START), _begin, (make, os.getpid()))
    waiting: deque[tuple[list[Row], Future[Made | DataError]]] = deque()

    def result() -> tuple[list[Row], Made]:
        batch, future = waiting.popleft()
        made = future.result()
        if isinstance(made, DataError):
            raise made
        return batch, made

    ended, refused = False, None
    try:
        while True:
            try:
                batch = next(batches, None)
            except DataError as error:  # what stands before these rows comes first
                batch, refused = None, error
            if batch is None:
                break
            waiting.append((batch, pool.submit(_work, batch)))
            if len(waiting) >= AHEAD * workers:
                yield result()
        while waiting:
            yield result()
        if refused is not None:
            raise refused
        ended = True
    except BrokenProcessPool:
        raise WorkerLost(
            f"one of {workers} processes that encode rows ended early, perhaps because the memory is full; fewer take "
            f"less memory: --data.workers 1"
        ) from None
    finally:
        if not ended:  # do not wait for work that nobody needs
            for child in multiprocessing.active_children():
                if child not in others:
                    child.kill()
        pool.shutdown(cancel_futures=True)


def _begin(make: Callable[[], Encoder], parent: int) -> None:
    """Make a new process a worker."""
    global _encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _encode = make()


def _end_with(parent: int) -> None:
    """End this process soon after its parent was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(batch: Sequence[Row]) -> Made | DataError:
    assert _encode is not None
    try:
        return _encode(batch)
    except DataError as error:
        return error
