"""The three sides of the data: rows to train on, rows that rates are tuned on, rows that scores are reported on.

Who gives one file gets all three from it, by a draw that depends on the seed alone; who gives `data.valid` without
`compare.test` gets both from its halves. What is drawn or cut is written beside the results, so that a training run can
be repeated on it by hand.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from reparam.data.rows import Row, read_rows
from reparam.errors import ConfigError
from reparam.io.staged import digest, write_file
from reparam.train.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Sides:
    """Three files, and what was done to come by them."""

    train: str
    valid: str
    test: str
    kind: str
    """Of the rows that are scored: "answers" or "texts"."""
    notes: tuple[str, ...]

    def stamp(self) -> str:
        """Changes when the content of any of the files does."""
        return " ".join(digest(file) for file in (self.train, self.valid, self.test))


def sides(data: DataConfig, test: str | None, folder: Path, *, rows: int, seed: int) -> Sides:
    """Read, split and cut; files that had to be made are in `folder`. At most `rows` of `valid` and `test` are kept.

    Raises DataError for unusable rows, ConfigError where there are too few of them to split.
    """
    notes: list[str] = []
    given = {"train": data.train, "valid": data.valid, "test": test}
    lines = {side: _lines(file) for side, file in given.items() if file is not None}
    draw = random.Random(seed)
    if "valid" not in lines and "test" not in lines:
        lines["train"], held = _draw(lines["train"], round(2 * data.holdout * len(lines["train"])), draw, data.train)
        lines["valid"], lines["test"] = _draw(held, len(held) // 2, draw, data.train)
        notes.append(
            f"{len(held)} rows of {data.train} are held out, half for tuning and half for the scores (seed {seed})."
        )
    elif "test" not in lines:
        assert data.valid is not None
        count = len(lines["valid"])
        lines["valid"], lines["test"] = _draw(lines["valid"], count // 2, draw, data.valid)
        notes.append(f"{data.valid} is halved (seed {seed}): rates are tuned on one half, scores are from the other.")
    elif "valid" not in lines:
        count = round(data.holdout * len(lines["train"]))
        lines["train"], lines["valid"] = _draw(lines["train"], count, draw, data.train)
        notes.append(f"{count} rows of {data.train} are held out to tune rates on (seed {seed}).")
    for side in ("valid", "test"):
        if len(lines[side]) > rows:
            notes.append(f"{rows} of {len(lines[side])} {side} rows are scored (compare.rows; seed {seed}).")
            lines[side] = _draw(lines[side], rows, draw, side)[1]
    files = {side: _file(side, given.get(side), lines[side], folder) for side in ("train", "valid", "test")}
    return Sides(files["train"], files["valid"], files["test"], _kind(read_rows(files["test"])), tuple(notes))


def _lines(file: str) -> list[str]:
    """The rows of a file as they stand in it, once they have all been found good."""
    read_rows(file)
    return [line for line in Path(file).read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def _draw(lines: list[str], count: int, draw: random.Random, source: str) -> tuple[list[str], list[str]]:
    """Those that are left and those that are drawn, each in the order of the file."""
    if not 0 < count < len(lines):
        raise ConfigError(
            f"{source}: {len(lines)} rows are too few to split ({count} would be drawn); give data.valid and "
            f"compare.test"
        )
    chosen = set(draw.sample(range(len(lines)), count))
    return [x for i, x in enumerate(lines) if i not in chosen], [x for i, x in enumerate(lines) if i in chosen]


def _file(side: str, given: str | None, lines: list[str], folder: Path) -> str:
    """The user's own file where it is used as it is, else one that is written here."""
    if given is not None and _lines(given) == lines:
        return given
    content = ("\n".join(lines) + "\n").encode()
    file = folder / f"{side}.jsonl"
    if not file.exists() or file.read_bytes() != content:
        write_file(file, content)
    return str(file)


def _kind(rows: list[Row]) -> str:
    return "texts" if rows[0].kind == "text" else "answers"
