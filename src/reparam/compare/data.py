"""Split the data into training rows, tuning rows (to choose learning rates) and test rows (for the reported scores).

If only `data.train` is given, tuning and test rows are held out of it. With `data.valid` but no `compare.test`, each
gets half of `data.valid`. With `compare.test` but no `data.valid`, tuning rows are held out of `data.train`. The draw
depends on the seed alone. Files made by splitting or cutting are kept with the results, to repeat runs on them.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reparam.data.formats import renamed
from reparam.data.mixture import mixed, told
from reparam.data.prompts import read_items
from reparam.data.rows import Reading, read_rows
from reparam.errors import ConfigError
from reparam.io.staged import digest, write_file
from reparam.tasks import find_task
from reparam.train.sections import DataConfig

# Settings of [data] that are met when the files of the sides are written.
MET: dict[str, Any] = {"data.columns": (), "data.weights": (), "data.max_rows": (), "data.bad_rows": "error"}


@dataclasses.dataclass(frozen=True)
class Sides:
    """Paths of the three JSONL files, and notes on how they were made."""

    train: str
    valid: str
    test: str
    kind: str
    """Kind of the test rows: "answers", "texts", or a task."""
    notes: tuple[str, ...]

    def stamp(self) -> str:
        """A string that changes when the content of any of the three files changes."""
        return " ".join(digest(file) for file in (self.train, self.valid, self.test))


def sides(data: DataConfig, test: str | None, folder: Path, *, rows: int, seed: int, task: str = "causal") -> Sides:
    """Read the files, split them, and cut `valid` and `test` to at most `rows` rows each; write new files to `folder`.

    Raises DataError for unusable rows and ConfigError for a file with too few rows to split.
    """
    notes: list[str] = []
    if data.weights and data.mix == "over":
        raise ConfigError("data.mix: repeated rows would be in training and tuning rows at once; set it to under")
    given = {"train": data.sources(), "valid": data.sources("valid"), "test": (test,) if test is not None else ()}
    names = {side: ", ".join(sources) for side, sources in given.items()}
    lines = {side: _lines(data, sources, seed, notes, side, task) for side, sources in given.items() if sources}
    read = dict(lines)
    draw = random.Random(seed)
    if "valid" not in lines and "test" not in lines:
        lines["train"], held = _draw(
            lines["train"], round(2 * data.holdout * len(lines["train"])), draw, names["train"]
        )
        lines["valid"], lines["test"] = _draw(held, len(held) // 2, draw, names["train"])
        notes.append(
            f"{len(held)} rows of {names['train']} are held out, half for tuning and half for the scores (seed {seed})."
        )
    elif "test" not in lines:
        count = len(lines["valid"])
        lines["valid"], lines["test"] = _draw(lines["valid"], count // 2, draw, names["valid"])
        notes.append(
            f"{names['valid']} is split in half (seed {seed}): one half tunes rates, the other gives the scores."
        )
    elif "valid" not in lines:
        count = round(data.holdout * len(lines["train"]))
        lines["train"], lines["valid"] = _draw(lines["train"], count, draw, names["train"])
        notes.append(f"{count} rows of {names['train']} are held out for tuning learning rates (seed {seed}).")
    for side in ("valid", "test"):
        if len(lines[side]) > rows:
            notes.append(f"{rows} of {len(lines[side])} {side} rows are scored (compare.rows; seed {seed}).")
            lines[side] = _draw(lines[side], rows, draw, side)[1]
    files: dict[str, str] = {}
    for side in ("train", "valid", "test"):
        whole = len(given[side]) == 1 and lines[side] == read[side] and not (data.columns or data.max_rows)
        as_it_is = whole and data.bad_rows == "error" and given[side][0].endswith(".jsonl")
        files[side] = given[side][0] if as_it_is else _written(side, lines[side], folder)
    return Sides(files["train"], files["valid"], files["test"], _kind(files, task), tuple(notes))


def _lines(data: DataConfig, sources: Sequence[str], seed: int, notes: list[str], side: str, task: str) -> list[str]:
    """The rows of these sources, mixed as configured, each as a line of JSONL in a format that needs no `columns`."""
    if task != "causal":
        find_task(task).read(",".join(sources), data.renamed())
        values = read_items(
            ",".join(sources), lambda value, place: [renamed(value, place, data.renamed())], expected="an object"
        )
        return [json.dumps(value, ensure_ascii=False, default=str) for value in values]
    most = data.max_rows if side == "train" else ()
    reading = Reading(sources, data.renamed(), most=most, bad_rows=data.bad_rows)
    rows = list(reading)
    notes.extend(f"{note}." for note in reading.notes())
    if side == "train" and data.weights:
        parts = np.split(np.arange(len(rows)), np.cumsum(reading.counts)[:-1])
        taken = mixed(parts, data.weights, data.mix, seed)
        notes.extend(f"{line}." for line in told(sources, parts, taken))
        rows = [rows[number] for number in np.concatenate(taken)]
    return [json.dumps(row.as_json(), ensure_ascii=False) for row in rows]


def _draw(lines: list[str], count: int, draw: random.Random, source: str) -> tuple[list[str], list[str]]:
    """Draw `count` lines; return the lines that are left and those that are drawn, both in the order of the file."""
    if not 0 < count < len(lines):
        raise ConfigError(
            f"{source}: {len(lines)} rows are too few to split ({count} would be held out); add rows, or set "
            f"data.valid and compare.test"
        )
    chosen = set(draw.sample(range(len(lines)), count))
    return [x for i, x in enumerate(lines) if i not in chosen], [x for i, x in enumerate(lines) if i in chosen]


def _written(side: str, lines: list[str], folder: Path) -> str:
    """Path of a file in `folder` with these lines."""
    content = ("\n".join(lines) + "\n").encode()
    file = folder / f"{side}.jsonl"
    if not file.exists() or file.read_bytes() != content:
        write_file(file, content)
    return str(file)


def _kind(files: Mapping[str, str], task: str) -> str:
    """Kind of the rows: "answers" or "texts", or the task, which is "regression" for a classification by numbers."""
    if task != "causal":
        found = find_task(task)
        return "regression" if found.head(found.read(files["train"], {}), None).regression else task
    rows = read_rows(files["test"])
    return "texts" if rows[0].kind == "text" else "answers"
