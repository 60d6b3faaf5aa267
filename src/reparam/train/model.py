"""Load the base model of a run and attach the adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.attach import attach
from reparam.adapter.load import load
from reparam.adapter.untie import untie
from reparam.adapter.without_sites import put_on
from reparam.core.method import Method
from reparam.errors import ConfigError
from reparam.hf.models import load_base
from reparam.hf.prompts import prompting_of  # the import registers prefix and prompt tuning
from reparam.hf.tasks import trained_parts
from reparam.io import files
from reparam.io.files import adapter_folder
from reparam.io.head import Head
from reparam.methods.lora import LoRA
from reparam.sites.expert_paths import numbers_of_experts
from reparam.train.base import BaseConfig
from reparam.train.config import Config
from reparam.train.sections import AdapterConfig


def loaded(base: BaseConfig, head: Head | None = None) -> nn.Module:
    """Load the base model that [base] describes: in its storage, and untied if `untie` is set; for its task, if any."""
    model = load_base(
        base.path,
        dtype=base.dtype,
        revision=base.revision,
        storage=base.quantization(),
        targets=base.quantized,
        head=head,
    )
    if base.untie:
        untie(model)
    return model


def attached(config: Config, model: nn.Module, method: Method, head: Head | None = None) -> Adapter:
    """Attach a new adapter of the method to the model. The `head` of a classifier trains whole.

    Raises ConfigError if [adapter] or run.gradient_checkpointing is set for a method that does not change weights
    (prefix and prompt tuning), and ValueError if the method does not fit the model.
    """
    where = config.adapter
    if where.start is not None:
        adapter = load(model, adapter_folder(where.start), trainable=True)
        adapter.head = head
        return adapter
    if method.changes_weights:
        adapter = attach(
            model,
            divided(method, model) if where.divide_expert_rank else method,
            targets=where.targets,
            bias=where.bias,
            modules_to_save=dict.fromkeys((*where.modules_to_save, *trained_parts(model, head))),
            tie=where.tie,
        )
        adapter.head = head
        return adapter
    if head is not None:
        raise ConfigError(f"method.name: {method.name} is for causal language models; choose another method for a task")
    if where != AdapterConfig() or config.run.gradient_checkpointing:
        raise ConfigError(f"{method.name} does not change modules: leave out [adapter] and run.gradient_checkpointing")
    return put_on(method, model)


def divided(method: Method, model: nn.Module) -> Method:
    """The method with the rank of experts divided by the number of experts of a token, and at least 1.

    The scale of an update stays alpha / r of its own rank. Raises ConfigError if the method has no `rank_pattern`, or
    if the model's configuration does not tell the number.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
    active = next((found for name in names if isinstance(found := getattr(text, name, None), int) and found > 0), None)
    r, patterns = getattr(method, "r", None), getattr(method, "rank_pattern", None)
    if active is None or r is None or patterns is None:
        why = "its configuration does not tell how many experts a token goes to" if r is not None else ""
        raise ConfigError(f"adapter.divide_expert_rank: {why or f'{method.name} has no rank to divide'}; leave it out")
    if not numbers_of_experts(model):
        raise ConfigError("adapter.divide_expert_rank: this model has no stacked experts; leave it out")
    own = {r"\w*experts\.\d+\.\w+": max(1, r // active)}
    return dataclasses.replace(method, rank_pattern={**patterns, **own})  # type: ignore[call-arg]


def started(config: Config) -> Config:
    """Take the method from the adapter that `adapter.start` names, if it is set.

    Raises ConfigError if another method or other modules are configured, and FormatError for a damaged adapter.
    """
    where = config.adapter
    if where.start is None:
        return config
    if where != AdapterConfig(start=where.start):
        raise ConfigError("adapter.start: the adapter's files give the modules; leave out the other keys of [adapter]")
    folder = adapter_folder(where.start)
    if prompting_of(folder) is not None:
        raise ConfigError(f"adapter.start: {folder} is a prompt; only adapters on modules can be trained further")
    method = files.read(folder).method
    if config.method not in (method, LoRA(seed=config.run.seed)):
        raise ConfigError(f"adapter.start: {folder} has the method {method}, not {config.method}; leave out [method]")
    return dataclasses.replace(config, method=method)


def by_task(method: Method, names_of: Callable[[], tuple[str, ...]]) -> tuple[Method, tuple[str, ...]]:
    """Give a method that depends on tasks those of the rows. Returns the method and the names of its tasks.

    `names_of` returns the distinct tasks of the rows; it is called only for a method that depends on them.

    A method that already has several tasks keeps them. If the method does not depend on tasks, or if all rows have the
    same task, it is returned unchanged, without names. Raises DataError for rows without a task.
    """
    known = method.known_tasks
    if known is None:
        return method, ()
    if len(known) > 1:
        return method, known
    names = names_of()
    return (method.with_tasks(names), names) if len(names) > 1 else (method, ())
