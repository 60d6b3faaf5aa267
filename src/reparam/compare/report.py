"""Render the report: one self-contained HTML file, from the dictionary that `results.json` holds.

The template escapes all text that comes from the user; `svg.py`, which makes the plots, escapes it too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from reparam.compare import plots

Cell = dict[str, Any]
TITLES = {
    "parameters": "Score and size",
    "step_seconds": "Score and training time",
    "peak_bytes": "Score and training memory",
    "decode_seconds": "Score and decoding latency",
}


def render(results: Mapping[str, Any]) -> str:
    """Return the HTML page. It makes no network request; its script only sorts the table."""
    rows, larger = results["rows"], results["larger_is_better"]
    scored = [row for row in rows if row["score"] is not None]
    curved = [row for row in rows if row["curve"]]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("reparam.compare").joinpath("report.html").read_text("utf-8"))
    fronts = [
        (
            TITLES[cost],
            Markup(plots.pareto(scored, cost, front, results["metric"], larger=larger, reference=results["reference"])),
        )
        for cost, front in results["fronts"].items()
        if front
    ]
    return template.render(
        **{key: results[key] for key in ("metric", "reference", "recommendation", "steps", "seeds", "base", "machine")},
        rows=rows,
        notes=results["notes"],
        missing=results["missing"],
        stopped=results["stopped"],
        plan=results["plan"],
        heads=_heads(results),
        cells=[_cells(row, results) for row in rows],
        plot_scores=Markup(plots.scores(scored, results["metric"], results["reference"])) if scored else "",
        fronts=fronts,
        curves=[(row["label"], Markup(plots.curve(curved, row["label"]))) for row in curved],
        grid=[f"{rate:g}" for rate in results["rates"]],
        tuning=[line for entry in results["tuning"] for line in _tuning(entry, results["rates"])],
    )


def _heads(results: Mapping[str, Any]) -> list[Cell]:
    better = "higher is better" if results["larger_is_better"] else "lower is better"
    heads = [
        ("contestant", "", ""),
        (results["metric"], better, ""),
        (f"difference to {results['reference']}", "paired by seed", ""),
        *((name, "", "") for name in _others(results)),
        ("parameters", "trained", ""),
        ("rate", "tuned", "learning rate"),
        ("step", "ms", "median time of a training step"),
        ("memory", "MiB", "peak memory of training"),
        ("decode", "ms per token", "greedy decoding at batch size 1, adapter not merged"),
        ("merged", "ms per token", "the same after merging the adapter into the base"),
        ("adapter", "KiB", "size of the adapter's files"),
    ]
    return [{"name": name, "unit": unit, "why": why} for name, unit, why in heads]


def _others(results: Mapping[str, Any]) -> list[str]:
    """Names of the scores other than the compared metric."""
    return list(dict.fromkeys(name for row in results["rows"] for name in row["others"]))


def _cells(row: Mapping[str, Any], results: Mapping[str, Any]) -> Cell:
    serving = row["serving"] or {}
    failed = f"{len(row['failed'])} failed" if row["failed"] else ""
    merged = serving.get("merged_seconds")
    cells = [
        {"shown": row["label"], "value": row["label"], "small": failed},
        _interval(row["score"]),
        _difference(row["difference"]),
        *(_interval(row["others"].get(name)) for name in _others(results)),
        _number(row["parameters"], "{:,.0f}"),
        {**_number(row["rate"], "{:g}"), "small": "*" if row["edge"] else ""},
        _number(row["step_seconds"], "{:.0f}", 1000),
        _number(row["peak_bytes"], "{:.0f}", 1 / 2**20),
        _number(serving.get("seconds"), "{:.1f}", 1000),
        _number(merged, "{:.1f}", 1000) if merged is not None or not serving else _unmerged(serving["merged"]),
        _number(serving.get("adapter_bytes"), "{:,.0f}", 1 / 1024),
    ]
    complete = [{"small": "", "kind": "", "why": "", **cell} for cell in cells]
    return {"cells": complete, "reference": row["label"] == results["reference"]}


def _interval(found: Mapping[str, Any] | None, *, sign: str = "") -> Cell:
    if found is None:
        return {"shown": "–", "value": ""}
    half = f"± {found['high'] - found['mean']:.3f}" if found["high"] is not None else ""
    return {"shown": f"{found['mean']:{sign}.3f}".replace("-", "−"), "value": found["mean"], "small": half}


def _difference(found: Mapping[str, Any] | None) -> Cell:
    if found is None:
        return {"shown": "", "value": ""}
    clear = found["low"] is not None and not found["low"] <= 0 <= found["high"]
    return {**_interval(found, sign="+"), "kind": "clear" if clear else ""}


def _number(value: float | None, form: str, times: float = 1) -> Cell:
    if value is None or not math.isfinite(value):
        return {"shown": "–", "value": ""}
    return {"shown": form.format(value * times), "value": value}


def _unmerged(why: str) -> Cell:
    return {"shown": "no", "value": "", "kind": "no", "why": why}


def _tuning(entry: Mapping[str, Any], rates: list[float]) -> list[Cell]:
    """One line for each rung at which the contestant was tuned; the rate with the lowest loss is marked."""
    lines: list[Cell] = []
    for steps, losses in entry["losses"].items():
        best = min((loss for loss in losses.values() if loss is not None), default=None)
        cells = []
        for rate in rates:
            loss, there = losses.get(f"{rate:g}"), f"{rate:g}" in losses
            shown = f"{loss:.3f}" if loss is not None else "failed" if there else ""
            cells.append({"shown": shown, "kind": "chosen" if loss is not None and loss == best else ""})
        lines.append({"label": "" if lines else entry["label"], "steps": steps, "cells": cells})
    return lines
