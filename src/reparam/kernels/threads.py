"""Sharing the work of a compiled CPU kernel among a few Python threads; and pointers for numba.

Not numba's threads: its OpenMP layer dies in a forked child, its own pool aborts on a call from a second thread, and
either would stand beside torch's pool. A kernel takes one share of the work and releases the GIL, and a few Python
threads take a share each of a call that is large enough. How work is shared out must never change a result.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch
from numba.core import cgutils
from numba.extending import intrinsic


def spread(kernel: Callable[..., bool], *numbers: int, worth: int, alive: object) -> bool:
    """Call `kernel(*numbers, share, shares)` for every share, at once; whether all of them returned True.

    `worth` is how many threads the work is worth; `alive` keeps the tensors behind the addresses in `numbers` alive in
    the workers' arguments, because an interrupt may leave this frame before they are done.
    """
    threads = min(torch.get_num_threads(), worth)
    if threads <= 1:
        return kernel(*numbers, 0, 1)
    pool = _pool(os.getpid(), threads - 1)
    others = [pool.submit(_share, kernel, alive, *numbers, share, threads) for share in range(1, threads)]
    good = kernel(*numbers, 0, threads)
    return all(other.result() for other in others) and good


def _share(kernel: Callable[..., bool], alive: object, *numbers: int) -> bool:
    return kernel(*numbers)


@functools.cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child has none of its parent's, and makes its own."""
    return ThreadPoolExecutor(workers, thread_name_prefix="reparam-kernel")


def _cast(context: Any, address: Any) -> Any:
    """Types and code of a cast from an address to the pointer that `carray` takes; numba has no public form of it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return numba.types.voidptr(address), generate


pointer: Any = intrinsic(_cast)
"""An address, in compiled code, as the pointer that `numba.carray` takes."""


def compile_kernel(function: Callable[..., bool], *, fastmath: set[str]) -> Callable[..., bool]:
    """Compile a kernel, whose arguments are whole numbers, now.

    The result is kept next to its file or in the user's folder; without one, every process compiles for some seconds.
    """
    signature = numba.types.boolean(*[numba.types.int64] * len(inspect.signature(function).parameters))
    settings: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
    try:
        return numba.njit(signature, cache=True, **settings)(function)
    except (RuntimeError, OSError):  # no folder that numba can write to
        return numba.njit(signature, cache=False, **settings)(function)
