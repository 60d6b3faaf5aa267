"""Tables of scores and answers for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from reparam.core.text import visible
from reparam.evaluation.score import Answer, Score


def scores_table(
    before: Sequence[Score], after: Sequence[Score], *, names: tuple[str, str] = ("base", "with adapter")
) -> Table:
    """A table of two lists of held-out scores with their intervals. `names` are the headings of the two columns."""
    table = Table()
    for column in ("held-out score", f"{names[0]}, 95 % interval", names[1], "rows"):
        table.add_column(column)
    for old, new in zip(before, after, strict=True):
        better = (new.value > old.value) == old.larger_is_better and new.value != old.value
        color = "green" if better else "red"
        table.add_row(
            f"{old.name} {'↑' if old.larger_is_better else '↓'}",
            _interval(old, ""),
            _interval(new, color),
            str(new.rows),
        )
    return table


def answers_table(pairs: Sequence[tuple[Answer, Answer]]) -> Table:
    """A table of questions with the expected answer and the answers (base model, adapter); correct ones are green."""
    table = Table(show_lines=True)
    for column in ("held-out question", "expected", "base", "with adapter"):
        table.add_column(column, overflow="fold", max_width=44)
    for base, adapted in pairs:
        mark = "green" if adapted.right else "red"
        plain = (short(text) for text in (base.question, base.expected, base.given))
        table.add_row(*plain, Text(visible(short(adapted.given)), mark))
    return table


def short(text: str) -> str:
    """The text in at most 80 characters, on one line."""
    found = text if len(text) <= 80 else text[:77] + "..."
    return found.replace("\n", "⏎ ")


def _interval(score: Score, color: str) -> Text:
    return Text.assemble((f"{score.value:.3f}", color), "  ", (f"{score.low:.3f} to {score.high:.3f}", "dim"))
