"""The task of each row, for methods that go by it: the column "task", a text or a whole number."""

from __future__ import annotations

from collections.abc import Sequence

from reparam.core.checks import nearest
from reparam.data.rows import Row
from reparam.errors import DataError

COLUMN = "task"


def task_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """The tasks that the rows name, sorted. Raises DataError, with all of them, for rows that name none."""
    problems = [problem for row in rows if (problem := _missing(row))]
    if problems:
        raise DataError(problems)
    return tuple(sorted({str(row.columns[COLUMN]) for row in rows}))


def task_numbers(rows: Sequence[Row], names: Sequence[str]) -> list[int]:
    """The number of each row's task among `names`. Raises DataError for rows without a task or with another one."""
    known = {name: number for number, name in enumerate(names)}
    problems = []
    for row in rows:
        if problem := _missing(row):
            problems.append(problem)
        elif (name := str(row.columns[COLUMN])) not in known:
            problems.append(f"{row.source}: the task {name!r} is none of {', '.join(names)}{nearest(name, names)}")
    if problems:
        raise DataError(problems)
    return [known[str(row.columns[COLUMN])] for row in rows]


def _missing(row: Row) -> str | None:
    value = row.columns.get(COLUMN)
    if isinstance(value, str | int) and not isinstance(value, bool):
        return None
    return f'{row.source}: no "{COLUMN}", which this method goes by; give each row a text or a whole number'
