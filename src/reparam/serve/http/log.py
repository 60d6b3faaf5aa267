"""Where the lines of the server and of its engine go."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def logged() -> Iterator[None]:
    """Write the lines of the server and of its engine to standard error."""
    log = logging.getLogger("reparam.serve")
    level, handler = log.level, log_to_errors()
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def log_to_errors() -> logging.Handler:
    """Write these lines to standard error from here on. Returns the handler that does it."""
    log, handler = logging.getLogger("reparam.serve"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    return handler
