"""Read and encode the training rows and the held-out rows of a run."""

from __future__ import annotations

import dataclasses
import datetime
import os
import random
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from reparam.core.method import Method
from reparam.core.text import counted
from reparam.data.batches import Encoded
from reparam.data.corpus import Corpus
from reparam.data.encode import encode_all
from reparam.data.examples import Examples
from reparam.data.files import files_of, kind, reader
from reparam.data.files.about import rows_about
from reparam.data.files.jsonl import LARGEST_LIST
from reparam.data.framing import Frame
from reparam.data.mixture import mixed, told
from reparam.data.preferences import Preferences
from reparam.data.prompts import Prompts
from reparam.data.row import Row
from reparam.data.rows import Reading
from reparam.data.streamed import Streamed
from reparam.errors import ConfigError
from reparam.io.head import Head
from reparam.io.outputs import user_cache
from reparam.io.prompt_format import PromptFormat
from reparam.train.cache import content_of, kept, key_of
from reparam.train.config import Config
from reparam.train.model import by_task
from reparam.train.ranges import bytes_of
from reparam.train.reading import check_chats, frame_of, prompt_format
from reparam.train.sections import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
WORTH_KEEPING = 1 << 24  # bytes of files whose encoded rows are kept without being asked to
KEPT = 1000  # held-out rows that are kept as rows, to answer them; all of them are encoded


class Data(NamedTuple):
    """The encoded rows of a run."""

    train: Encoded | Preferences | Prompts | Examples
    valid: Encoded | Preferences | Prompts | Examples
    held_out: list[Row]
    """The first held-out rows to answer: `data.score_rows`, and at least 1,000."""
    method: Method
    """The configured method, which knows the tasks of the rows if it depends on them."""
    checked: tuple[Corpus | Preferences | Prompts | Streamed | Examples, ...]
    """All that was encoded or will be; the first one holds the training rows."""
    prompt_format: PromptFormat | None
    """How an adapter that is trained on the rows is prompted; None for other tasks than causal language modeling."""
    stream: Streamed | None = None
    """The training rows, if they are streamed; `train` holds a sample of them."""
    head: Head | None = None
    """What the model must be for; None for a causal language model."""

    def check_vocabulary(self, size: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise DataError for token ids that the model, with an input embedding of `size` rows, does not have."""
        for rows in self.checked:
            rows.check_vocabulary(size, tokenizer)


def read_data(config: Config, tokenizer: PreTrainedTokenizerBase, *, reading: Callable[..., Reading] = Reading) -> Data:
    """Read and encode all rows; `reading` makes the stream of rows.

    Raises DataError for rows that cannot be used, and ConfigError for settings of [data].

    Rows are held out before others are mixed. Which ones depends on the seed and on the number of rows alone.
    """
    data, seed = config.data, config.run.seed
    with_tasks = config.method.known_tasks is not None
    framed = frame_of(data, tokenizer)
    corpus = _corpus(data, data.sources(), tokenizer, framed, reading, with_tasks=with_tasks, most=data.max_rows)
    check_chats(data, corpus.kinds)
    other = None
    if data.valid is not None:
        other = _corpus(data, data.sources("valid"), tokenizer, framed, reading, with_tasks=with_tasks)
    rows, held = np.arange(len(corpus)), np.arange(len(other or ()))
    if other is None:
        out = held_out(config, len(corpus))
        rows, held = np.flatnonzero(~out), np.flatnonzero(out)
    ends = np.cumsum(corpus.counts)[:-1]
    parts = np.split(rows, np.searchsorted(rows, ends))
    full = corpus.with_examples()
    parts = [part[full[part]] for part in parts]
    taken = mixed(parts, data.weights, data.mix, seed)
    chosen = np.concatenate(taken) if data.weights else rows
    method, tasks = by_task(config.method, lambda: corpus.task_names(rows))
    train = corpus.part(chosen, tasks=tasks)
    if len(parts) > 1:
        lines = told(data.sources(), parts, taken)
        train = dataclasses.replace(train, report=dataclasses.replace(train.report, lines=(*lines, *corpus.lines)))
    valid = (other or corpus).part(held, tasks=tasks, notes=other is not None)
    shown = list(framed.rows(_held_out(data, other or corpus, held, reading)))
    checked = (corpus, *([other] if other else []))
    return Data(train, valid, shown, method, checked, prompt_format(data, tokenizer, corpus.kinds))


def read_valid(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, framed: Frame
) -> tuple[Corpus, Encoded, list[Row]]:
    """The rows of `data.valid`: all of them encoded, as a corpus and as examples, and the first ones as rows."""
    corpus = _corpus(data, data.sources("valid"), tokenizer, framed, Reading, with_tasks=False)
    return corpus, corpus.part(), list(framed.rows(_held_out(data, corpus, np.arange(len(corpus)), Reading)))


def _corpus(
    data: DataConfig,
    sources: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    framed: Frame,
    rows: Callable[..., Reading],
    *,
    with_tasks: bool,
    most: tuple[int, ...] = (),
) -> Corpus:
    """The encoded rows of these sources, from the cache if there is one."""
    settings: dict[str, Any] = {
        "max_length": data.max_length,
        "loss_on": data.loss_on,
        "too_long": data.too_long,
        "bad_rows": data.bad_rows,
        "with_tasks": with_tasks,
    }

    def make(folder: Path | None) -> Corpus:
        reading = rows(sources, data.renamed(), most=most, bad_rows=data.bad_rows, streaming=data.streaming)
        about = None if None in found or most else rows_about(files)
        corpus = encode_all(
            framed.rows(reading), tokenizer, **settings, folder=folder, about=about, workers=data.workers
        )
        return dataclasses.replace(corpus, counts=tuple(reading.counts), notes=reading.notes())

    found = [files_of(source) for source in sources]
    files = [file for part in found if part is not None for file in part]
    folder = cache_folder(data.cache, files)
    if folder is None or None in found:
        return make(None)
    for file in files:
        if kind(file) != ".json" or file.stat().st_size > LARGEST_LIST:  # a list is parsed as a whole
            next(iter(reader(file)(file)), None)  # what is no data file is refused before all of it is hashed
    shapes = [len(part or ()) for part in found]
    template = str(tokenizer.chat_template)
    everything = {
        **settings,
        "frame": dataclasses.asdict(framed),
        "columns": data.renamed(),
        "most": most,
        "files of each source": shapes,
        "tokenizer": content_of(tokenizer),
        "template": template,
        "date": str(datetime.date.today()) if "strftime_now" in template else "",  # the template may write it
    }
    corpus, told = kept(
        folder, key_of(files, everything), files, make, limit=bytes_of("data.cache_limit", data.cache_limit)
    )
    return dataclasses.replace(corpus, lines=(f"encoded rows: {told}",))


def cache_folder(wish: str, files: Sequence[Path]) -> Path | None:
    """The folder of the cache, or None if the rows of these files are not kept."""
    if wish == "off":
        return None
    if wish != "auto":
        return Path(wish)
    place = user_cache("data")
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    large = sum(file.stat().st_size for file in files) >= WORTH_KEEPING
    return place if large and os.access(existing, os.W_OK) else None


def held_out(config: Config, total: int) -> np.ndarray:
    """Which of so many rows are held out, [total] bool. Raises ConfigError if there are too few."""
    share = config.data.holdout
    if not 0 < share < 1:
        raise ConfigError(f"data.holdout: {share} is not between 0 and 1; change it, or set data.valid")
    count = max(1, round(total * share))
    if count >= total:
        raise ConfigError(
            f"{', '.join(config.data.sources())}: a file of {counted(total, 'row')} is too small to hold one out; set "
            f"data.valid"
        )
    held = np.zeros(total, dtype=bool)
    held[random.Random(config.run.seed).sample(range(total), count)] = True
    return held


def read_parts(config: Config, read: Callable[[str], list[T]]) -> tuple[list[T], list[T]]:
    """The items to train on, and those that are held out: of `data.valid`, or a share of the others.

    `read` reads the items of one source. Raises ConfigError as `held_out` does.
    """
    items = [item for source in config.data.sources() for item in read(source)]
    if config.data.valid is not None:
        return items, [item for source in config.data.sources("valid") for item in read(source)]
    held = held_out(config, len(items)).tolist()
    kept, out = ([item for item, is_out in zip(items, held, strict=True) if is_out is side] for side in (False, True))
    return kept, out


def _held_out(data: DataConfig, corpus: Corpus, held: np.ndarray, reading: Callable[..., Reading]) -> list[Row]:
    """The first held-out rows that have examples; they are read again, because only encoded rows are kept."""
    count = max(data.score_rows, KEPT)
    wanted = held[corpus.with_examples()[held]][:count].tolist()
    sources, most = (data.sources(), data.max_rows) if data.valid is None else (data.sources("valid"), ())
    rows = reading(sources, data.renamed(), most=most, bad_rows=data.bad_rows, streaming=data.streaming)
    chosen = set(wanted)
    return [row for number, row in enumerate(islice(rows, wanted[-1] + 1)) if number in chosen]
