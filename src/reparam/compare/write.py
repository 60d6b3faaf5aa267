"""Write the results of a comparison: `results.json`, `report.html`, and a table on the console."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from reparam.compare.report import render
from reparam.compare.results import Findings, results
from reparam.evaluation.terminal import note, say
from reparam.io.staged import write_file


def write(findings: Findings, folder: Path, console: Console) -> Path:
    """Write `results.json` and `report.html`, print a summary, and return the path of the report."""
    found = results(findings)
    write_file(folder / "results.json", (json.dumps(found, indent=1) + "\n").encode())
    write_file(folder / "report.html", render(found).encode())
    if found["rows"]:
        say(console, table(found))
    for sentence in found["missing"]:
        say(console, note("note", sentence))
    say(console, found["recommendation"])
    say(console, f"report         {folder / 'report.html'}")
    return folder / "report.html"


def table(found: dict[str, Any]) -> Table:
    """Table of each contestant's score, difference to the reference, trained parameters and rate, best first."""
    made = Table()
    heads = ("", f"{found['metric']}, 95 % interval", f"difference to {found['reference']}", "parameters", "rate")
    for head in heads:
        made.add_column(head, justify="right" if head in ("parameters", "rate") else "left")
    for row in found["rows"]:
        score = "failed" if row["score"] is None else plus_minus(row["score"])
        difference = "" if row["difference"] is None else plus_minus(row["difference"], sign="+")
        made.add_row(row["label"], score, difference, f"{row['parameters']:,}", f"{row['rate']:g}")
    return made


def plus_minus(interval: dict[str, Any], *, sign: str = "") -> str:
    """Format a mean and half the length of its interval.

    >>> plus_minus({"mean": 0.5, "low": 0.4, "high": 0.6})
    '0.500 ± 0.100'
    """
    half = "" if interval["high"] is None else f" ± {interval['high'] - interval['mean']:.3f}"
    return f"{interval['mean']:{sign}.3f}{half}"
