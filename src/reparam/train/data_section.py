"""The section [data] of a run's configuration: its keys, default values and ranges."""

from __future__ import annotations

import dataclasses
from typing import Literal

from reparam.core.checks import finite, whole
from reparam.core.text import counted
from reparam.data.chat import LossOn
from reparam.data.files import split_sources
from reparam.data.findings import BadRows
from reparam.data.lengths import TooLong
from reparam.data.mixture import Mix
from reparam.errors import ConfigError
from reparam.train.ranges import bytes_of, check, count


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The rows to train on, and the held-out rows."""

    train: str | tuple[str, ...] = ""
    """Training rows: a file (JSONL, JSON, CSV, TSV, Parquet, Arrow, text), a glob, a folder, a data set such as
    owner/name, or - for standard input. Several are separated by commas."""
    valid: str | tuple[str, ...] | None = None
    """Held-out rows to score. By default, a share of the training rows is held out."""
    weights: tuple[float, ...] = ()
    """Shares of several sources of training rows, in their order, such as 0.7,0.3. By default, all rows are used."""
    mix: Mix = "under"
    """How weights are met: rows are left out (under) or repeated (over)."""
    max_rows: tuple[int, ...] = ()
    """Number of rows to take from each source of training rows, from its start: one number, or one for each."""
    columns: tuple[str, ...] = ()
    """Under which keys the rows hold those of a format, such as prompt=question,completion=answer. By default, the keys
    tell the format."""
    holdout: float = 0.05
    """Share of the training rows to hold out when data.valid is not set."""
    max_length: int = 1024
    """Maximum length of a row in tokens. data.too_long says what becomes of longer rows."""
    too_long: TooLong = "auto"
    """What becomes of rows longer than data.max_length: error, drop, truncate, split, or auto: chats and completions
    are truncated and texts split."""
    bad_rows: BadRows = "error"
    """What becomes of rows that cannot be read or trained on: error, or drop: they are left out and counted."""
    streaming: bool = False
    """Read, encode and shuffle rows while training goes, for rows that do not fit on the disk. Needs run.max_steps."""
    buffer: int = 1000
    """Number of examples in memory from which data.streaming draws the next one at random."""
    packing: bool = False
    """Put several training rows into one row of up to data.max_length tokens. Each sees its own tokens alone."""
    loss_on: LossOn = "answers"
    """Which tokens of chats and completions count in the loss: answers, the last answer of a chat, or all."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own: a name such as chatml, plain (for a base without one) or llama3; a
    .jinja file or a folder with a tokenizer; or trl, TRL's twin for training of the tokenizer's own template."""
    system: str | None = None
    """System message for chats without one."""
    thinking: bool | None = None
    """Whether chats are rendered with thinking, for templates with a variable for it, such as enable_thinking."""
    workers: int | None = None
    """Number of processes that encode rows; it changes nothing in them. By default, the number of cores, at most 4, for
    data of more than 8 MB, and otherwise 1."""
    cache: str = "auto"
    """Where encoded rows are kept for later runs: a folder, off, or auto: data of at least 16 MiB in
    $XDG_CACHE_HOME/reparam/data (by default ~/.cache/reparam/data)."""
    cache_limit: int | str = "50GiB"
    """Largest size of that folder, in bytes or as 20GiB. What was not used for the longest time is deleted first."""
    score_rows: int = 200
    """Number of held-out rows to answer before and after training, to count exact matches."""

    def __post_init__(self) -> None:
        idle = self.valid is not None and self.holdout == 0
        check(
            self,
            "data",
            holdout=("a share above 0 and below 1", lambda share: idle or 0 < share < 1),
            max_length=count(1),
            weights=("finite numbers above 0", lambda values: all(finite(value) and value > 0 for value in values)),
            max_rows=("whole numbers of at least 1", lambda values: all(whole(value, 1) for value in values)),
            cache=("off, auto or a folder", bool),
            buffer=count(1),
            workers=("a whole number of at least 1", lambda value: value is None or whole(value, 1)),
            score_rows=count(0),
        )
        bytes_of("data.cache_limit", self.cache_limit)
        self.renamed()
        names = self.sources()
        for key, one_for_all in (("weights", False), ("max_rows", True)):
            given = len(getattr(self, key))
            if self.train and given not in (0, len(names)) and not (one_for_all and given == 1):
                raise ConfigError(
                    f"data.{key}: {counted(given, 'number')} for {counted(len(names), 'source')} ({', '.join(names)}); "
                    f"give one for each"
                )

    def sources(self, side: Literal["train", "valid"] = "train") -> tuple[str, ...]:
        """The sources of the training rows or of the held-out rows, by name; a comma separates several."""
        return split_sources(getattr(self, side) or ())

    def renamed(self) -> dict[str, str]:
        """`columns` as a dictionary from a format's key to the rows' key. Raises ConfigError for another form."""
        pairs = [pair.partition("=") for pair in self.columns]
        if wrong := [pair for pair, (key, _, name) in zip(self.columns, pairs, strict=True) if not key or not name]:
            raise ConfigError(f"data.columns: {wrong[0]!r}: expected key=name, such as prompt=question")
        return {key.strip(): name.strip() for key, _, name in pairs}
