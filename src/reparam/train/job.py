"""What a training run works on, and what it produces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from reparam.adapter.adapter import Adapter
from reparam.data.batches import Encoded
from reparam.data.rows import Row
from reparam.evaluation.score import Answer, Score
from reparam.optim.pager import Paging
from reparam.train.config import Config


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run works on."""

    config: Config
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter
    train: Encoded
    valid: Encoded
    held_out: Sequence[Row]
    """The rows that are scored; `valid` is these, encoded."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run produced."""

    folder: Path
    before: tuple[Score, ...]
    after: tuple[Score, ...]
    answers: tuple[tuple[Answer, Answer], ...]
    """For each scored row that has an answer, the base model's and the adapter's."""
    signal: int | None = None
    """The signal that ended the run early, after a checkpoint; there are no scores then."""
    paging: Paging | None = None
    """What the optimizer's pager did, if it is one of ours."""
