"""Two processes of one run, as torchrun starts them: forks of this process, so that nothing is imported again."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

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
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):  # those of earlier tests
            state._reset_state()
        made = act()
        code = made if isinstance(made, int) else 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
