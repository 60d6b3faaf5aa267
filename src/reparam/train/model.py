"""The base of a run, and the method on it."""

from __future__ import annotations

from torch import nn

from reparam import prompts
from reparam.adapter import Adapter, attach, untie
from reparam.base import Method
from reparam.hf import load_base
from reparam.methods.prompts import Prompting
from reparam.train.config import AdapterConfig, BaseConfig, Config, ConfigError


def loaded(base: BaseConfig) -> nn.Module:
    """The base as its section says: in its storage, and untied if it is to be."""
    model = load_base(base.path, dtype=base.dtype, revision=base.revision, storage=base.packing(), targets=base.packed)
    if base.untie:
        untie(model)
    return model


def attached(config: Config, model: nn.Module, method: Method) -> Adapter:
    """The method on the model, or in front of what it reads. Raises ValueError for what does not fit."""
    where = config.adapter
    if not isinstance(method, Prompting):
        return attach(model, method, targets=where.targets, bias=where.bias, modules_to_save=where.modules_to_save)
    if where != AdapterConfig() or config.run.gradient_checkpointing:
        raise ConfigError(f"{method.name} goes on no module: leave out [adapter] and run.gradient_checkpointing")
    return prompts.attach(model, method)
