"""The task of each row, for methods that depend on it: the column "task", a string or an integer."""

from __future__ import annotations

from collections.abc import Sequence

from reparam.core.checks import nearest
from reparam.data.row import Row
from reparam.errors import DataError

COLUMN = "task"


def task_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """The distinct tasks of the rows, sorted. Raises DataError that lists all rows without a task."""
    problems = [missing(row.source) for row in rows if task_of(row) is None]
    if problems:
        raise DataError(problems)
    return tuple(sorted({str(row.columns[COLUMN]) for row in rows}))


def task_numbers(rows: Sequence[Row], names: Sequence[str]) -> list[int]:
    """Index of each row's task in `names`. Raises DataError for rows whose task is missing or not in `names`."""
    known = {name: number for number, name in enumerate(names)}
    problems = []
    for row in rows:
        if (name := task_of(row)) is None:
            problems.append(missing(row.source))
        elif name not in known:
            problems.append(
                f"{row.source}: unknown task {name!r}; expected one of {', '.join(names)}{nearest(name, names)}"
            )
    if problems:
        raise DataError(problems)
    return [known[str(row.columns[COLUMN])] for row in rows]


def task_of(row: Row) -> str | None:
    """The task of a row, or None if it has none."""
    value = row.columns.get(COLUMN)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def missing(source: str) -> str:
    """The problem of a row without a task."""
    return f'{source}: no "{COLUMN}", which this method depends on; give each row a string or an integer'
