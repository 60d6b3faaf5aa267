"""The task of each row, for methods that depend on it: the column "task", a string or an integer."""

from __future__ import annotations

from collections.abc import Sequence

from reparam.core.checks import nearest
from reparam.data.row import Row
from reparam.errors import DataError

COLUMN = "task"


def task_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """The distinct tasks of the rows, sorted. Raises DataError that lists all rows without a task."""
    problems = [problem for row in rows if (problem := _missing(row))]
    if problems:
        raise DataError(problems)
    return tuple(sorted({str(row.columns[COLUMN]) for row in rows}))


def task_numbers(rows: Sequence[Row], names: Sequence[str]) -> list[int]:
    """Index of each row's task in `names`. Raises DataError for rows whose task is missing or not in `names`."""
    known = {name: number for number, name in enumerate(names)}
    problems = []
    for row in rows:
        if problem := _missing(row):
            problems.append(problem)
        elif (name := str(row.columns[COLUMN])) not in known:
            problems.append(
                f"{row.source}: unknown task {name!r}; expected one of {', '.join(names)}{nearest(name, names)}"
            )
    if problems:
        raise DataError(problems)
    return [known[str(row.columns[COLUMN])] for row in rows]


def _missing(row: Row) -> str | None:
    value = row.columns.get(COLUMN)
    if isinstance(value, str | int) and not isinstance(value, bool):
        return None
    return f'{row.source}: no "{COLUMN}", which this method depends on; give each row a string or an integer'
