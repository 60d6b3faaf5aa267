"""The command line: verbs, their options and exit codes. Other packages implement what the verbs do.

Exit codes: 0 success, 1 failure at run time, 2 wrong usage or configuration, 130 after SIGINT, 143 after SIGTERM.
This module imports only the standard library, so that `main` can report a missing dependency.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

EXTRA = {
    "accelerate",
    "cma",
    "jinja2",
    "matplotlib",
    "pydantic",
    "rich",
    "scipy",
    "tomli_w",
    "transformers",
    "typer",
    "yaml",
}

LONGEST = 300  # characters of a path in a message


def main() -> None:
    """Run the command line and exit with its code; print a sentence for a failure."""
    if "LOCAL_RANK" in os.environ:  # torchrun started this; DDP warns of every run in which all parameters are used
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    atexit.register(gc.freeze)  # so that the collections at exit do not visit all objects of torch
    try:
        with _no_collections():
            code = _run()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        print(f"The command line needs {package}: run  pip install 'reparam[cli]'", file=sys.stderr)
        code = 2
    raise SystemExit(code)


def __getattr__(name: str) -> Any:
    """Import `app`, the application, when it is first used."""
    if name == "app":
        return importlib.import_module("reparam.cli.options").app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Turn the garbage collector off until a verb runs; `Verb.invoke` turns it on.

    Imports make many objects and little garbage. Each full collection visits all objects, which takes a tenth of a
    second once torch is imported.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _plain_messages() -> Iterator[None]:
    """Show warnings without their source lines, and warnings and log entries without control characters.

    Characters that the encoding of the terminal lacks are written as escape sequences.
    """
    from reparam.core.text import visible

    def record(*args: Any, **settings: Any) -> logging.LogRecord:
        made = record_of(*args, **settings)
        made.msg, made.args = visible(made.getMessage()), ()
        return made

    shown, record_of = warnings.showwarning, logging.getLogRecordFactory()
    warnings.showwarning = lambda message, *rest, **more: print(f"warning: {visible(str(message))}", file=sys.stderr)
    logging.setLogRecordFactory(record)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        warnings.showwarning = shown
        logging.setLogRecordFactory(record_of)


def _run() -> int:
    import typer
    from rich.console import Console

    from reparam.cli.options import app
    from reparam.evaluation.terminal import note, say

    usage_problem: Any = typer.BadParameter.__mro__[2]  # click's ClickException; newer versions of typer bundle click
    errors = Console(stderr=True)
    try:
        with _plain_messages():
            code = app(prog_name="reparam", standalone_mode=False)
    except usage_problem as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its text is the help, in colors
            error.show()
        else:
            told = io.StringIO()
            error.show(told)
            say(errors, told.getvalue().removesuffix("\n"))
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        say(errors, "interrupted")
        code = 130
    except (OSError, RuntimeError, FloatingPointError, MemoryError) as error:
        say(errors, note("failed:", _reason(error), "bold red"))
        code = 1
    except ValueError as error:
        say(errors, note("error:", str(error), "bold red"))
        code = 2
    except ModuleNotFoundError:
        raise
    except Exception:  # a fault of the package: the traceback is for its report, but names in it stay text
        say(errors, traceback.format_exc().rstrip("\n"))
        code = 1
    return code if isinstance(code, int) else 0


def _reason(error: Exception) -> str:
    """The text of a failure, with the path of a file; for a lack of memory, what was asked for and what lowers it."""
    from reparam.core.memory import lacks_memory, memory_sentence

    if isinstance(error, OSError) and isinstance(error.filename, str) and error.strerror:
        name = error.filename
        return f"{name if len(name) < LONGEST else name[:LONGEST] + '...'}: {error.strerror}"
    return memory_sentence(error) if lacks_memory(error) else str(error)
