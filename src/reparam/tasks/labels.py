"""The classes of a data set: their names, in an order that does not depend on that of the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from reparam.core.checks import nearest
from reparam.data.examples import Item
from reparam.errors import DataError
from reparam.io.head import Head

MOST = 10_000


def labels_for(
    items: Sequence[Item], targets: Sequence[Any], known: tuple[str, ...] | None, *, least: int = 2
) -> tuple[str, ...]:
    """The names of the classes: those that the base knows, if it knows all; or else those of the rows, sorted.

    Whole numbers that are no names in the base are the places in its list. Raises DataError for too few classes, or so
    many that the labels are surely something else.
    """
    names = sorted({str(target) for target in targets}, key=_order)
    if known is not None and all(place_of(target, known) is not None for target in targets):
        return known
    place = items[0].source.rpartition(":")[0] or items[0].source
    if len(names) < least:
        has = f"all rows have the label {names[0]!r}" if names else "no row has a label"
        raise DataError([f"{place}: {has}; give rows of {least} classes"])
    if len(names) > MOST:
        raise DataError(
            [f"{items[0].source}: {len(names):,} different labels (first: {names[0]!r}); is this the right key?"]
        )
    return tuple(names)


def place_of(target: Any, labels: Sequence[str]) -> int | None:
    """The number of a class from 0: that of its name, or else the whole number itself; None if it is no class."""
    if str(target) in labels:
        return labels.index(str(target))
    counts = isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(labels)
    return target if counts else None


def _order(name: str) -> tuple[int, str]:
    """Whole numbers in their order, before other names."""
    return (int(name), "") if name.isascii() and name.isdecimal() else (1 << 62, name)


def check_known(items: Sequence[Item], targets: Sequence[Sequence[Any]], head: Head) -> None:
    """Raise DataError, with the first row of each, for labels that the head does not have."""
    problems: dict[str, str] = {}
    given = [item for item in items if item.target is not None]
    for item, own in zip(given, targets, strict=True):
        for target in own:
            if place_of(target, head.labels) is None and str(target) not in problems:
                problems[str(target)] = (
                    f"{item.source}: the label {str(target)!r} is in no training row; expected one of "
                    f"{', '.join(head.labels[:8])}{nearest(str(target), head.labels)}"
                )
    if problems:
        raise DataError(list(problems.values()))


def counted_labels(targets: Sequence[Any], labels: Sequence[str]) -> str:
    """The first eight labels, each with the number of targets that have it."""
    counts = Counter(labels[place_of(target, labels) or 0] for target in targets)
    shown = [f"{name} {counts[name]:,}" for name in labels[:8]]
    return ", ".join([*shown, *(["..."] if len(labels) > 8 else [])])
