"""Processes of their own: forks of this one, in which nothing is imported again."""

from __future__ import annotations

import os
import pty
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator


def fork(act: Callable[[], object], out: int, err: int) -> int:
    """Call `act` in a fork with these file descriptors as its stdout and stderr. Returns the number of the process.

    The fork ends with the code of a SystemExit, with a returned number, or with 0, and with 1 after another error.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for number, given in ((1, out), (2, err)):
            os.dup2(given, number)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
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


class Forked:
    """A fork whose output is read line by line."""

    def __init__(self, act: Callable[[], object]) -> None:
        with tempfile.TemporaryFile() as errors:
            read, write = os.pipe()
            self._errors = os.dup(errors.fileno())
            self.pid = fork(act, write, self._errors)
            os.close(write)
        self._lines = open(read)  # noqa: SIM115  (closed at the end)

    def until(self, line: str) -> None:
        """Read up to a line that starts like this one."""
        if not any(found.startswith(line) for found in self._lines):
            raise AssertionError(f"ended with {self.end()[0]} without {line!r}: {self.errors}")

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def end(self) -> tuple[int, str]:
        """Wait for the end. Returns the exit code, -9 if it was killed, and the rest of the output."""
        rest = self._lines.read()
        self._lines.close()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.errors = os.pread(self._errors, 100_000, 0).decode()
        os.close(self._errors)
        return code, rest


def on_terminal(act: Callable[[], object]) -> str:
    """What `act` shows on a terminal of 120 columns and 40 lines, in a fork. It must end without an error."""
    leader, follower = pty.openpty()

    def there() -> object:
        os.environ.update(COLUMNS="120", LINES="40", TERM="xterm")
        return act()

    child = fork(there, follower, follower)
    os.close(follower)
    told = b"".join(_parts(leader)).decode()
    os.close(leader)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, told
    return told


def _parts(leader: int) -> Iterator[bytes]:
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed
            return
        if not part:
            return
        yield part
