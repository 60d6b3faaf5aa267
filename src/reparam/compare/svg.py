"""Build plots as SVG text without a plotting library.

Coordinates are in SVG user units. A plot is 460 units wide, so that its text is readable on a phone. Colors are CSS
classes; the page's style sheet defines them for the light, dark and print modes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH = 460
Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
Spot = tuple[float, float, str]
"""x, y and text-anchor of a label."""
_CHARACTER = 6.9  # mean width of a character in a label


def svg(height: float, body: Sequence[str], title: str, *, width: float = WIDTH) -> str:
    """An `<svg>` element around the parts in `body`; screen readers read `title`."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )


def text(x: float, y: float, content: str, *, anchor: str = "start", kind: str = "label") -> str:
    """A `<text>` element of one line; the content is escaped."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A `<line>` element from (x1, y1) to (x2, y2)."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def path(points: Sequence[tuple[float, float]], kind: str) -> str:
    """A `<polyline>` element through the points."""
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{kind}"/>'


def dot(x: float, y: float, kind: str, tip: str) -> str:
    """A `<circle>` element with a tooltip; the tooltip is escaped."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="{kind}"><title>{escape(tip)}</title></circle>'


def scale(low: float, high: float, start: float, end: float, *, log: bool = False) -> Callable[[float], float]:
    """A function that maps values from [low, high] linearly, or by logarithm, to coordinates from [start, end]."""
    f = math.log10 if log else float
    a, b = f(low), f(high)
    span = (b - a) or 1.0
    return lambda value: start + (f(value) - a) / span * (end - start)


def ticks(low: float, high: float, *, log: bool = False, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high` for an axis, about `most` of them.

    >>> ticks(0.12, 0.58)
    [0.2, 0.3, 0.4, 0.5]
    >>> ticks(300, 90000, log=True)
    [1000.0, 10000.0]
    """
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        for steps in ((1,), (1, 3), (1, 2, 5)):
            found = [s * 10.0**e for e in range(first, last + 1) for s in steps if low <= s * 10.0**e <= high]
            if len(found) >= 2:
                return found[:: max(1, math.ceil(len(found) / (most + 1)))]
        return found
    raw = (high - low) / most or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def around(values: Sequence[float], *, log: bool = False) -> tuple[float, float]:
    """Ends of an axis that covers the values, with a margin on both sides."""
    low, high = min(values), max(values)
    if log:
        room = (high / low) ** 0.08 if high > low else 1.5
        return low / room, high * room
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def placed(points: Mapping[str, Point], lines: Sequence[Point], box: Box) -> dict[str, Spot]:
    """Position of each point's label, chosen so that labels overlap each other, points and lines as little as possible.

    `lines` are the corners of a line of horizontal and vertical segments; `box` is the area for labels.
    """
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points.values()]
    taken += [(min(a, c), min(b, d) - 1, max(a, c) + 1, max(b, d) + 1) for (a, b), (c, d) in itertools.pairwise(lines)]
    found: dict[str, Spot] = {}
    for name, (x, y) in points.items():
        width = len(name) * _CHARACTER
        spots = [(x + 9, y + 4, "start"), (x - 9, y + 4, "end")]
        spots += [(x, y + d, "middle") for d in (-10, 18)]
        spots += [(x + s * 9, y + d, a) for d in (-10, 18, -22, 30, -34, 42) for s, a in ((1, "start"), (-1, "end"))]
        best = min(spots, key=lambda spot: (_cost(spot, width, taken, box), spots.index(spot)))
        found[name] = best
        taken.append(_extent(best, width))
    return found


def _extent(spot: Spot, width: float) -> Box:
    x, y, anchor = spot
    left = {"start": x, "end": x - width, "middle": x - width / 2}[anchor]
    return left, y - 10, left + width, y + 3


def _cost(
    spot: Spot,
    width: float,
    taken: Sequence[Box],
    box: Box,
) -> float:
    """Area that a label at `spot` would overlap, plus 100 times the length by which it would leave the box."""
    a = _extent(spot, width)
    covered = sum(
        max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1])) for b in taken
    )
    outside = max(0.0, box[0] - a[0]) + max(0.0, a[2] - box[2]) + max(0.0, box[1] - a[1]) + max(0.0, a[3] - box[3])
    return covered + 100 * outside
