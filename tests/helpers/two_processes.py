"""Two processes of one run, as torchrun starts them, but in forks of this process."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from forks import fork

SECONDS = 120  # after which processes that hang are killed


def two_processes(act: Callable[[], object], folder: Path) -> list[tuple[int, str, str]]:
    """Call `act` in two connected processes. Returns the exit code, stdout and stderr of each; -9 if it hung."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    children = [_fork(act, rank, port, folder) for rank in range(2)]
    codes: dict[int, int] = {}
    end = time.monotonic() + SECONDS
    while len(codes) < 2:
        for child in children:
            done, status = os.waitpid(child, os.WNOHANG) if child not in codes else (0, 0)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.02)
    texts = [[_told(folder / f"{name}-{rank}") for name in ("out", "err")] for rank in range(2)]
    return [(codes[child], out, err) for child, (out, err) in zip(children, texts, strict=True)]


def _told(file: Path) -> str:
    """The lines of a file without the warning of DDP, which the command line turns off before torch is imported."""
    return "".join(line for line in file.read_text().splitlines(keepends=True) if "find_unused_parameters" not in line)


def _fork(act: Callable[[], object], rank: int, port: int, folder: Path) -> int:
    def there() -> object:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):  # those of earlier tests
            state._reset_state()
        return act()

    with (folder / f"out-{rank}").open("w") as out, (folder / f"err-{rank}").open("w") as err:
        return fork(there, out.fileno(), err.fileno())
