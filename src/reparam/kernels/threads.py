"""Run a compiled CPU kernel in several Python threads; and pointers for numba.

numba's own threads are not used: its OpenMP layer crashes in a forked child, its workqueue pool aborts if a second
thread calls it, and either would compete with torch's pool. A kernel computes one share of the work and releases the
GIL; if a call is large enough, several Python threads compute one share each. The result must not depend on how the
work is divided.
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
    """Call `kernel(*numbers, share, shares)` for all shares in parallel. Returns whether all of them returned True.

    `worth` is the number of threads that the work justifies; at most `torch.get_num_threads()` are used. `alive` holds
    the tensors behind the addresses in `numbers`: the workers keep a reference to it, because an interrupt may leave
    this function before they are done.
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
    """The thread pool of this process. A forked child does not inherit its parent's threads and creates its own."""
    return ThreadPoolExecutor(workers, thread_name_prefix="reparam-kernel")


def _cast(context: Any, address: Any) -> Any:
    """Signature and code of a cast from an address to a pointer for `carray`; numba has no public function for it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return numba.types.voidptr(address), generate


pointer: Any = intrinsic(_cast)
"""Cast an address to a pointer for `numba.carray`; for use in compiled code."""


def compile_kernel(function: Callable[..., bool], *, fastmath: set[str]) -> Callable[..., bool]:
    """Compile a kernel whose arguments are all int64, immediately.

    The machine code is cached next to the source file or in the user's cache folder. If neither is writable, every
    process compiles the kernel again, which takes some seconds.
    """
    signature = numba.types.boolean(*[numba.types.int64] * len(inspect.signature(function).parameters))
    settings: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
    try:
        return numba.njit(signature, cache=True, **settings)(function)
    except (RuntimeError, OSError):  # no folder that numba can write to
        return numba.njit(signature, cache=False, **settings)(function)
