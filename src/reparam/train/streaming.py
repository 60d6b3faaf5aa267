"""`data.streaming`: rows that are read, encoded and shuffled while training goes."""

from __future__ import annotations

import dataclasses
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from reparam.core.text import counted
from reparam.data.encode import encode_all
from reparam.data.feeds import Feed
from reparam.data.rows import Reading
from reparam.data.streamed import How, Streamed
from reparam.errors import ConfigError
from reparam.train import processes
from reparam.train.config import Config
from reparam.train.data import KEPT, Data, held_out, read_valid
from reparam.train.evaluating import Evaluated
from reparam.train.reading import check_chats, frame_of, prompt_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEEN = 1000  # rows that are encoded before training, to show and to check them
HELD_FROM = 20_000  # rows at the start from which rows are held out


def check_streaming(config: Config) -> None:
    """Raise ConfigError for settings that cannot be used with `data.streaming`, or only with it."""
    data, run = config.data, config.run
    if not data.streaming:
        if data.buffer != type(data)().buffer:
            raise ConfigError("data.buffer has no effect without data.streaming: leave it out")
        return
    wrong = {
        "run.max_steps must be set with data.streaming, because the number of rows, and so of steps in an epoch, is "
        "not known": run.max_steps < 1,
        "run.group_by_length needs the lengths of all rows, which data.streaming does not know: leave out one of the "
        "two": run.group_by_length,
        "data.cache: the rows of data.streaming are encoded as they are used, and are not kept; leave it out": (
            data.cache not in ("auto", "off")
        ),
        "data.weights must be set with data.streaming and several sources: the share of each, because their numbers of "
        "rows are not known": len(data.sources()) > 1 and not data.weights,
        "data.train: standard input cannot be read again from where a run stopped, which data.streaming needs; write "
        "the rows into a file": "-" in data.sources(),
        f"method.name: {config.method.name} has to know the tasks of all rows before training, which data.streaming "
        "does not; leave out one of the two": config.method.known_tasks is not None,
    }
    if problems := [text for text, is_wrong in wrong.items() if is_wrong]:
        raise ConfigError("; ".join(problems))


def read_stream(config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The stream of the training rows, with an encoded sample of them, and the held-out rows.

    Without `data.valid`, rows of the first 20,000 are held out. Raises as `read_data` does.
    """
    data, run = config.data, config.run
    framed = frame_of(data, tokenizer)
    sources = data.sources()
    most: list[int | None] = [*data.max_rows] or [None]
    most *= len(sources) if len(most) == 1 else 1
    wanted = -(-(SEEN if data.valid is not None else HELD_FROM) // len(sources))
    limits = [min(limit or wanted, wanted) for limit in most]
    reading = Reading(sources, data.renamed(), most=limits, bad_rows=data.bad_rows, streaming=True)
    rows = list(framed.rows(reading))
    held = []
    if data.valid is None:
        out = held_out(config, len(rows))
        held = [row for row, is_out in zip(rows, out, strict=True) if is_out]
        rows = [row for row, is_out in zip(rows, out, strict=True) if not is_out]
    settings: dict[str, Any] = {
        "max_length": data.max_length,
        "loss_on": data.loss_on,
        "too_long": data.too_long,
        "bad_rows": data.bad_rows,
    }
    sample = encode_all(islice(rows, SEEN), tokenizer, **settings, lenient=True)
    check_chats(data, sample.kinds)
    report = sample.part().report
    lines = (
        f"streamed: these are the first {counted(len(sample), 'row')}; the others are read during training, and the "
        f"next example is drawn from {data.buffer:,}",
    )
    train = dataclasses.replace(sample.part(), report=dataclasses.replace(report, lines=lines))
    if data.valid is None:
        other = encode_all(held, tokenizer, **settings, lenient=True)
        valid = other.part()
        shown = [held[number] for number in np.flatnonzero(other.with_examples())]
    else:
        other, valid, shown = read_valid(data, tokenizer, framed)
    batch = run.batch_size * processes.count()
    stream = Streamed(
        [Feed(source, seed=run.seed, most=limit) for source, limit in zip(sources, most, strict=True)],
        tokenizer,
        How(**settings, packing=data.packing, buffer=data.buffer, seed=run.seed),
        length=run.max_steps * run.accumulation * batch,
        behind=(2 * run.accumulation + 2) * batch,
        weights=data.weights,
        columns=data.renamed(),
        frame=framed,
        held=[row.source for row in held],
    )
    form = prompt_format(data, tokenizer, sample.kinds)
    return Data(train, valid, shown[: max(data.score_rows, KEPT)], config.method, (sample, other, stream), form, stream)


class Streaming(Evaluated):
    """A Trainer on a stream, whose state is a part of the checkpoints."""

    @property
    def stream(self) -> Streamed:
        """The data set."""
        found = self.train_dataset
        return cast(Streamed, getattr(found, "rows", found))

    def _row_order(self) -> dict[str, Any]:
        # Without the number of rows, which is that of the steps: a run may go on with more of them.
        return {key: value for key, value in super()._row_order().items() if key != "number of training rows"}

    def unlogged(self) -> dict[str, Any]:
        """The state of the stream after the rows of the steps so far."""
        args = self.args
        batch = args.per_device_train_batch_size * args.world_size
        return self.stream.state(self.state.global_step * args.gradient_accumulation_steps * batch)

    def log_later(self, values: Any) -> None:
        """Restore the state of the stream."""
        self.stream.restore(values)
