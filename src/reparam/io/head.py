"""What a model is for, if it is no causal language model: `task.json`, beside the files of an adapter in any format.

It names the task, the labels of the classes, and how embeddings are pooled. The class of the model follows from it.
PEFT's files state the task alone (`task_type`); the number of classes is then that of the saved head.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

FILE = "task.json"
Task = Literal["causal", "seq2seq", "classification", "token-classification", "embedding"]
Pooling = Literal["mean", "cls", "last"]
PEFT_TYPES: dict[str, Task] = {
    "SEQ_CLS": "classification",
    "TOKEN_CLS": "token-classification",
    "SEQ_2_SEQ_LM": "seq2seq",
    "FEATURE_EXTRACTION": "embedding",
}
"""PEFT's names of the tasks."""


@dataclasses.dataclass(frozen=True)
class Head:
    """What a model is for."""

    task: Literal["seq2seq", "classification", "token-classification", "embedding"]
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of the logits. Empty for those that the base's files name, and without
    classes."""
    regression: bool = False
    """Whether a classification has one number as its target instead of a class."""
    pooling: Pooling = "mean"
    """How the vectors of the tokens become one embedding: their mean, the first one (cls), or the last one."""
    max_length: int | None = None
    """Number of tokens to which texts were cut in training; None for the limit of the model."""
    seed: int = 0
    """Seed of the parts that the base's files do not have, such as a new head."""

    def content(self) -> bytes:
        """The content of the file."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()

    @property
    def peft_type(self) -> str:
        """PEFT's name of the task."""
        return next(name for name, task in PEFT_TYPES.items() if task == self.task)

    @property
    def outputs(self) -> int | None:
        """The number of logits; None for that of the base's files, and without classes."""
        return 1 if self.regression else len(self.labels) or None
