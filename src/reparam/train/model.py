"""The base of a run, and the method on it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

import reparam.hf.prompts  # noqa: F401  (registers how its methods are put on a model)
from reparam.adapter.adapter import Adapter
from reparam.adapter.attach import attach, untie
from reparam.adapter.without_sites import put_on
from reparam.core.method import Method
from reparam.data.rows import Row
from reparam.data.tasks import task_names
from reparam.errors import ConfigError
from reparam.hf.models import load_base
from reparam.train.base import BaseConfig
from reparam.train.config import AdapterConfig, Config


def loaded(base: BaseConfig) -> nn.Module:
    """The base as its section says: in its storage, and untied if it is to be."""
    model = load_base(
        base.path, dtype=base.dtype, revision=base.revision, storage=base.quantization(), targets=base.quantized
    )
    if base.untie:
        untie(model)
    return model


def attached(config: Config, model: nn.Module, method: Method) -> Adapter:
    """The method on the model, or in front of what it reads. Raises ValueError for what does not fit."""
    where = config.adapter
    if method.changes_weights:
        return attach(model, method, targets=where.targets, bias=where.bias, modules_to_save=where.modules_to_save)
    if where != AdapterConfig() or config.run.gradient_checkpointing:
        raise ConfigError(f"{method.name} goes on no module: leave out [adapter] and run.gradient_checkpointing")
    return put_on(method, model)


def by_task(method: Method, rows: Sequence[Row]) -> tuple[Method, tuple[str, ...]]:
    """The method with the tasks that the rows name, if it goes by tasks and has none of its own; and these names.

    Methods that do not go by tasks are given back with no names, and so is one where all rows have one task. Raises
    DataError for rows without a task.
    """
    known = method.known_tasks
    if known is None:
        return method, ()
    if len(known) > 1:
        return method, known
    names = task_names(rows)
    return (method.with_tasks(names), names) if len(names) > 1 else (method, ())
