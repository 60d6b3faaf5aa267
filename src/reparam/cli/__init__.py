"""The command line: verbs, their options and exit codes. What they do is elsewhere.

Exit codes: 0 done, 2 usage or configuration, 1 failure at run time, 130 and 143 after SIGINT and SIGTERM.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console

import reparam.cli.run  # the order of `--help`

# isort: split
import reparam.cli.adapters
import reparam.cli.compare
import reparam.cli.models
import reparam.cli.study  # noqa: F401
from reparam.cli.options import app

UsageProblem: Any = typer.BadParameter.__mro__[2]  # click's ClickException; newer typer has a click of its own


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings as one line, without a source line under them."""
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *rest, **more: print(f"warning: {message}", file=sys.stderr)
    try:
        yield
    finally:
        warnings.showwarning = shown


def main() -> None:
    """Run the command line, with one sentence and an exit code for every failure."""
    errors = Console(stderr=True)
    try:
        with _plain_warnings():
            code = app(standalone_mode=False)
    except UsageProblem as error:
        error.show()
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        errors.print("interrupted")
        code = 130
    except (OSError, RuntimeError, FloatingPointError) as error:
        errors.print(f"[bold red]failed:[/bold red] {_escaped(error)}", highlight=False, soft_wrap=True)
        code = 1
    except ValueError as error:
        errors.print(f"[bold red]error:[/bold red] {_escaped(error)}", highlight=False, soft_wrap=True)
        code = 2
    raise SystemExit(code if isinstance(code, int) else 0)


def _escaped(error: BaseException) -> str:
    return str(error).replace("[", r"\[")
