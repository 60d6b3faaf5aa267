"""Draw the report's plots: scores with intervals, score against cost with the Pareto front, and learning curves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reparam.compare import svg

Row = Mapping[str, Any]
FAR = 16  # a label farther above or below its point than this gets a line to it
COSTS: dict[str, tuple[str, Callable[[float], float]]] = {
    "parameters": ("trained parameters", float),
    "step_seconds": ("milliseconds per training step", lambda v: 1000 * v),
    "peak_bytes": ("peak memory of training, MiB", lambda v: v / 2**20),
    "decode_seconds": ("milliseconds per decoded token, not merged", lambda v: 1000 * v),
}


def scores(rows: Sequence[Row], metric: str, reference: str) -> str:
    """Draw each contestant's mean score and interval on its own line, over a band for the reference's interval."""
    rows = [row for row in rows if row["score"] is not None]
    names = 12 + 7.2 * max(len(row["label"]) for row in rows)
    left, right, top, height = min(names, 200), svg.WIDTH - 14, 8, 24
    bottom = top + height * len(rows)
    ends = [
        v for row in rows for v in (row["score"]["mean"], row["score"]["low"], row["score"]["high"]) if v is not None
    ]
    low, high = svg.around(ends)
    x = svg.scale(low, high, left, right)
    body = _grid_x(x, svg.ticks(low, high), top, bottom, str)
    beside = next((row["score"] for row in rows if row["label"] == reference), None)
    if beside is not None and beside["low"] is not None:
        a, b = x(beside["low"]), x(beside["high"])
        body.append(f'<rect x="{a:.1f}" y="{top}" width="{b - a:.1f}" height="{bottom - top}" class="band"/>')
    for number, row in enumerate(rows):
        y, score = top + height * (number + 0.5), row["score"]
        kind = "reference" if row["label"] == reference else "point"
        if score["low"] is not None:
            body.append(svg.line(x(score["low"]), y, x(score["high"]), y, f"whisker {kind}"))
        body.append(svg.dot(x(score["mean"]), y, kind, f"{row['label']}: {score['mean']:.4f}"))
        body.append(svg.text(left - 10, y + 4, _short(row["label"]), anchor="end"))
    body.append(
        svg.text((left + right) / 2, bottom + 34, f"{metric}, mean and 95 % interval", anchor="middle", kind="axis")
    )
    return svg.svg(bottom + 42, body, f"{metric} of each contestant with its 95 % interval")


def pareto(rows: Sequence[Row], cost: str, front: Sequence[str], metric: str, *, larger: bool, reference: str) -> str:
    """Draw the mean score against a cost, a point for each contestant, and the Pareto front as a line."""
    rows = [row for row in rows if row["score"] is not None and row[cost] is not None]
    title, unit = COSTS[cost]
    costs = {row["label"]: unit(row[cost]) for row in rows}
    means = {row["label"]: row["score"]["mean"] for row in rows}
    log = max(costs.values()) > 8 * min(costs.values()) > 0
    left, right, top, bottom = 48.0, svg.WIDTH - 12.0, 20.0, 254.0
    x_low, x_high = svg.around(list(costs.values()), log=log)
    y_low, y_high = svg.around(list(means.values()))
    x = svg.scale(x_low, x_high, left, right, log=log)
    y = svg.scale(y_low, y_high, bottom, top)
    body = _grid_x(x, svg.ticks(x_low, x_high, log=log), top, bottom, count)
    body += [
        part
        for value in svg.ticks(y_low, y_high)
        for part in (
            svg.line(left, y(value), right, y(value), "grid"),
            svg.text(left - 6, y(value) + 4, f"{value:g}", anchor="end", kind="tick"),
        )
    ]
    places = {label: (x(costs[label]), y(means[label])) for label in costs}
    steps = _steps([places[label] for label in front])
    body.append(svg.path(steps, "front"))
    labels = svg.placed(places, steps, (left, top - 6, right + 8, bottom))
    for label, (px, py) in places.items():
        kind = "reference" if label == reference else "point" if label in front else "beaten"
        body.append(svg.dot(px, py, kind, f"{label}: {means[label]:.4f} at {count(costs[label])}"))
        lx, ly, anchor = labels[label]
        if abs(ly - 4 - py) > FAR:
            body.append(svg.line(px, py, lx, ly - 4, "leader"))
        body.append(svg.text(lx, ly, label, anchor=anchor, kind="label" if label in front else "label beaten"))
    better = "higher is better" if larger else "lower is better"
    body.append(
        svg.text((left + right) / 2, bottom + 34, title + (", log scale" if log else ""), anchor="middle", kind="axis")
    )
    body.append(svg.text(left, 11, f"{metric} ({better})", kind="axis"))
    return svg.svg(bottom + 42, body, f"{metric} against {title}; on the Pareto front: {', '.join(front)}")


def curve(rows: Sequence[Row], label: str) -> str:
    """Draw one contestant's held-out loss by step in front of the curves of all others."""
    width, left, right, top, bottom = 230.0, 34.0, 222.0, 10.0, 104.0
    points = [point for row in rows for point in row["curve"]]
    (x_low, x_high), (y_low, y_high) = (svg.around([point[i] for point in points]) for i in (0, 1))
    x, y = svg.scale(x_low, x_high, left, right), svg.scale(y_low, y_high, bottom, top)
    body = _grid_x(x, [v for v in svg.ticks(x_low, x_high, most=3) if v == int(v)], top, bottom, count)
    body += [
        svg.text(left - 5, y(v) + 4, f"{v:g}", anchor="end", kind="tick") for v in svg.ticks(y_low, y_high, most=3)
    ]
    others = [row for row in rows if row["label"] != label]
    own = [row for row in rows if row["label"] == label]
    for row, kind in [*((row, "other") for row in others), *((row, "curve") for row in own)]:
        body.append(svg.path([(x(step), y(loss)) for step, loss in row["curve"]], kind))
    last = own[0]["curve"][-1]
    return svg.svg(bottom + 20, body, f"held-out loss of {label} by step: {last[1]:.3f} at step {last[0]}", width=width)


def count(value: float) -> str:
    """Format a number for an axis, with at most three digits and a suffix.

    >>> [count(v) for v in (0.5, 40, 1500, 224256, 5475584)]
    ['0.5', '40', '1.5k', '224k', '5.48M']
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _grid_x(
    x: Callable[[float], float], values: Sequence[float], top: float, bottom: float, shown: Callable[[float], str]
) -> list[str]:
    return [
        part
        for value in values
        for part in (
            svg.line(x(value), top, x(value), bottom, "grid"),
            svg.text(x(value), bottom + 16, shown(value), anchor="middle", kind="tick"),
        )
    ]


def _steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the front as a staircase: between two points the score stays that of the cheaper one."""
    found = list(points[:1])
    for (_, before), (x, y) in itertools.pairwise(points):
        found += [(x, before), (x, y)]
    return found


def _short(label: str) -> str:
    return label if len(label) <= 27 else label[:26] + "…"
