"""Format the output of `--help`: the names of each option are never truncated, and its help text is below them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text
from typer.core import TyperCommand

from reparam.cli.given import check_apart, check_words
from reparam.cli.screen import waits
from reparam.cli.spelling import spelled
from reparam.core.surface import on_command_line
from reparam.train import processes

_USAGE: Any = typer.BadParameter.__mro__[2]  # click's ClickException; newer versions of typer bundle click
INDENT, DEEPER = (0, 0, 0, 2), (0, 0, 0, 8)


class Verb(TyperCommand):
    """A command whose help shows all option names in full at any terminal width."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command with the garbage collector on; objects from imports so far are never collected.

        Errors advise options of the command line.
        """
        gc.freeze()
        gc.enable()
        with on_command_line([name for p in self.params for name in p.opts]), _told_by_the_first():
            if processes.count() > 1 and self.name != "train":
                raise ValueError(f"reparam {self.name} runs in one process: call it without torchrun")
            check_apart(self, ctx)
            with waits(str(self.name), ctx.params):
                return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the arguments, also as users of transformers' scripts type them."""
        try:
            words = spelled(args, self.params)
            check_words(self, ctx, words)
            return super().parse_args(ctx, words)
        except _USAGE as error:
            name = str(getattr(error, "option_name", ""))
            if self.name == "train" and (told := _told_of(name)):
                raise typer.BadParameter(f"{name} has no counterpart: {told}", ctx=ctx) from None
            raise

    def make_context(self, *args: Any, **more: Any) -> Any:
        """Parse the arguments; of several processes, the first one alone reports wrong usage."""
        with _told_by_the_first():
            return super().make_context(*args, **more)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the usage line, the description, and the options grouped by panel."""
        panels: dict[str, list[Any]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(parameter)
        parts = described(self, ctx)
        for title, parameters in panels.items():
            rows = [line for parameter in parameters for line in _lines(parameter, ctx)]
            parts += [heading(title), *rows] if rows else []
        write(formatter, parts)


@contextlib.contextmanager
def _told_by_the_first() -> Iterator[None]:
    """End a process that is not the first one without a message where all meet the same mistake of the user."""
    try:
        yield
    except (ValueError, _USAGE):
        if processes.rank() > 0:
            raise SystemExit(2) from None
        raise


def _told_of(option: str) -> str | None:
    """What is to be done without an option that other tools have."""
    from reparam.train.foreign.convert import reason

    return reason(option.lstrip("-").replace("-", "_"))


def described(command: Any, ctx: Any) -> list[RenderableType]:
    """Render the usage line and the paragraphs of a command's description."""
    paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    found: list[RenderableType] = [Text(command.get_usage(ctx), "bold")]
    for paragraph in paragraphs:
        found += ["", Text.from_markup(paragraph)]
    return found


def heading(title: str) -> RenderableType:
    """Render the title above a group of options."""
    return Text(f"\n{title}", "bold yellow")


def row(names: str, text: Text) -> list[RenderableType]:
    """Render an option's names and, below them, its help text."""
    return [Padding(Text(names.strip(), "bold cyan"), INDENT), Padding(text, DEEPER)]


def write(formatter: Any, parts: list[RenderableType]) -> None:
    """Render the parts as text and pass it to click's formatter, which prints it."""
    console = Console(highlight=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    formatter.write("\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n")


def _lines(parameter: Any, ctx: Any) -> list[RenderableType]:
    record = parameter.get_help_record(ctx)  # None for a hidden option
    if record is None:
        return []
    text = parameter.help or ""
    more = record[1].removeprefix(text).replace("\\[", "[")
    return row(record[0], Text.from_markup(text + escape(more)))
