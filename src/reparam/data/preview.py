"""A preview of the training data: the first rows, with the tokens that carry loss highlighted.

On a terminal, these tokens are bold and green, and all others are dim. Elsewhere, such as in a log file, they are
enclosed in ⟦ ⟧. Newlines and control characters are shown as symbols.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from reparam.core.text import counted, symbol
from reparam.data.batches import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 400  # characters shown per run of tokens; the middle of a longer run is left out
LOSS, NO_LOSS = "bold green", "dim"


def preview(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, *, rows: int = 3) -> Preview:
    """A preview of the first `rows` examples, for `rich.print` or `Console.print`."""
    return Preview(encoded, tokenizer, rows=rows)


class Preview:
    """The rich renderable that `preview` returns."""

    def __init__(self, encoded: Encoded, tokenizer: PreTrainedTokenizerBase, *, rows: int) -> None:
        self._encoded = encoded
        self._tokenizer = tokenizer
        self._rows = min(rows, len(encoded))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield a legend, then a heading and the tokens of each row."""
        color = console.is_terminal and console.color_system is not None
        opening, closing = ("", "") if color else ("[[", "]]") if options.ascii_only else ("⟦", "⟧")
        yield Text.assemble(
            (f"{opening}tokens with loss{closing}", LOSS if color else ""),
            " ",
            ("tokens without loss", NO_LOSS if color else ""),
        )
        for index in range(self._rows):
            runs = list(self.runs(index))
            loss = sum(count for carries, count, _ in runs if carries)
            source, tokens = printable(self._encoded.sources[index]), counted(sum(r[1] for r in runs), "token")
            yield Text(f"{source}: {tokens}, {loss:,} with loss")
            body = Text()
            for carries, _, content in runs:
                shown = printable(_shortened(content), ascii_only=options.ascii_only)
                if color:
                    body.append(shown, LOSS if carries else NO_LOSS)
                else:
                    body.append(f"{opening}{shown}{closing}" if carries else shown)
            yield body

    def runs(self, index: int) -> Iterator[tuple[bool, int, str]]:
        """Runs of consecutive tokens that all carry loss or all do not: (carries loss, number of tokens, text)."""
        example = self._encoded[index]
        pairs = zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True)
        for carries, run in groupby(pairs, key=lambda pair: pair[0] == pair[1]):
            ids = [token for token, _ in run]
            yield carries, len(ids), str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def printable(text: str, *, ascii_only: bool = False) -> str:
    """The text with newlines marked, and control characters replaced by symbols or escape sequences.

    >>> printable("a\\tb\\x1b[31m")
    'a⇥b␛[31m'
    >>> printable("a\\tb\\x1b[31mé", ascii_only=True)
    'a\\\\tb\\\\x1b[31m\\\\xe9'
    """
    if ascii_only:
        return "".join(c if c.isascii() and c.isprintable() else _escaped(c) for c in text)
    return "".join(c if c.isprintable() else _symbol(c) for c in text)


def _symbol(character: str) -> str:
    return {"\n": "↵\n", "\t": "⇥"}.get(character) or symbol(character)


def _escaped(character: str) -> str:
    newline = "\n" if character == "\n" else ""
    return character.encode("unicode_escape").decode() + newline


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
