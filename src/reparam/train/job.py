"""The inputs and the result of a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from reparam.adapter.adapter import Adapter
from reparam.data.batches import Encoded
from reparam.data.examples import Examples
from reparam.data.packing import Packed
from reparam.data.preferences import Preferences
from reparam.data.prompts import Prompts
from reparam.data.streamed import Streamed
from reparam.evaluation.score import Answer, Score
from reparam.images.seeing import Seeing
from reparam.optim.pager import Paging
from reparam.train.config import Config


@dataclasses.dataclass(frozen=True)
class Job:
    """The inputs of a training run."""

    config: Config
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter
    train: Encoded | Preferences | Prompts | Examples
    valid: Encoded | Preferences | Prompts | Examples
    held_out: Sequence[Any]
    """The held-out rows; `valid` holds the same rows, encoded."""
    packed: Packed | None = None
    """The training rows in packs, with `data.packing`."""
    stream: Streamed | None = None
    """The training rows, with `data.streaming`; `train` holds a sample of them."""
    seeing: Seeing | None = None
    """What makes the inputs of a vision-language model from the rows."""

    @property
    def drawn(self) -> Encoded | Preferences | Prompts | Examples | Packed | Streamed:
        """What batches are drawn from: training rows, packs of them, a stream, preferences, prompts, rows of a task."""
        return self.stream or self.packed or self.train


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a training run."""

    folder: Path
    before: tuple[Score, ...]
    after: tuple[Score, ...]
    answers: tuple[tuple[Answer, Answer], ...]
    """For each scored row with an expected answer, the answers without and with the adapter."""
    signal: int | None = None
    """The signal that stopped the run early, after a checkpoint was saved; `after` and `answers` are empty then."""
    paging: Paging | None = None
    """Statistics of the paged optimizer; None for other optimizers."""
