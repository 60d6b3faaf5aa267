"""Tasks beyond causal language modeling: their rows, batches, losses and scores. One file for each task.

`reparam.hf.tasks` has the classes of their models, and `reparam.io.head` what an adapter's files say about them.
"""

from __future__ import annotations

from reparam.errors import ConfigError
from reparam.tasks.classification import Classification
from reparam.tasks.embedding import Embedding
from reparam.tasks.seq2seq import Seq2seq
from reparam.tasks.task import Task
from reparam.tasks.token_classification import TokenClassification

TASKS: dict[str, Task] = {task.name: task for task in (Classification(), TokenClassification(), Seq2seq(), Embedding())}


def find_task(name: str) -> Task:
    """The task of this name. Raises ConfigError for another name."""
    if name not in TASKS:
        raise ConfigError(f"{name!r} is no task; expected causal, {', '.join(TASKS)}")
    return TASKS[name]
