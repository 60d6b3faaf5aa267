"""The optimizer of a run, one of reparam or one of transformers, and the parameter groups of LoRA+ for either.

reparam's optimizers replace the optimizers of bitsandbytes that transformers knows by the same names; bitsandbytes is
not needed for them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from reparam.core.base import Role, Site
from reparam.core.checks import nearest
from reparam.errors import ConfigError
from reparam.optim import PagedAdamW, Paging, check_rates, lora_plus
from reparam.train.ranges import bytes_of
from reparam.train.sections import OptimConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from reparam.adapter.adapter import Adapter
    from reparam.train.trainer import Resumable

BITS = {"paged_adamw_32bit": 32, "paged_adamw_8bit": 8, "adamw_8bit": 8}


@dataclasses.dataclass(frozen=True)
class Rates:
    """A parameter group of LoRA+ with its settings at the start of training."""

    name: str
    rate: float
    """Peak learning rate of the group."""
    multiple: float
    """`rate` divided by `optim.learning_rate`."""
    weight_decay: float
    parameters: int
    """Number of trained values."""


def check_optimizer(optim: OptimConfig) -> None:
    """Raise ConfigError for an unknown optimizer or schedule, and for bad settings of reparam's optimizers or LoRA+."""
    kinds = (("name", optim.name, OptimizerNames), ("schedule", optim.schedule, SchedulerType))
    for key, value, known in kinds:
        names = [member.value for member in known]
        if value not in names:
            raise ConfigError(f"optim.{key}: {value!r} is unknown to transformers{nearest(value, names)}")
    if optim.name in BITS:
        given = settings(optim, folder=None)
        try:
            PagedAdamW([torch.zeros(1)], **given)  # allocates no state before its first step
        except ValueError as error:
            raise ConfigError(f"optim: {error}") from None
    idle = [
        key
        for key in ("lora_plus_embedding", "lora_plus_vectors")
        if optim.lora_plus is None and getattr(optim, key) != getattr(OptimConfig, key)
    ]
    if idle:
        raise ConfigError(f"optim.{idle[0]} has no effect without optim.lora_plus: set that as well (usually 16)")
    a, b = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1, 1))
    groups(optim, [("A", a, "in"), ("B", b, "out")], {})


def groups(
    optim: OptimConfig,
    parameters: Iterable[tuple[str, nn.Parameter, Role | None]],
    sites: Mapping[str, Site],
    *,
    no_decay: Iterable[nn.Parameter] | None = None,
) -> list[dict[str, Any]] | None:
    """The parameter groups of LoRA+, or None if `optim.lora_plus` is not set; see `reparam.optim.lora_plus`.

    `no_decay` are the parameters without weight decay. Raises ConfigError for a rate or ratio out of range, for frozen
    parameters, and if no parameter has the role "out".
    """
    if optim.lora_plus is None:
        return None
    try:
        return lora_plus(
            parameters,
            sites,
            lr=optim.learning_rate,
            ratio=optim.lora_plus,
            embedding_lr=optim.lora_plus_embedding,
            vectors=optim.lora_plus_vectors,
            weight_decay=optim.weight_decay,
            no_decay=no_decay,
        )
    except ValueError as error:
        raise ConfigError(f"optim.lora_plus: {error}") from None


def install_optimizer(trainer: Resumable, optim: OptimConfig, adapter: Adapter) -> tuple[Rates, ...]:
    """Set the optimizer that the Trainer will create and, if LoRA+ is on, its parameter groups.

    Without LoRA+, the Trainer makes two groups: with weight decay, and without it (biases and norms). LoRA+ divides
    both further. On a CPU, a paged optimizer pages to a file in the run folder. Returns the groups of LoRA+, if any.

    Raises ConfigError if LoRA+ is on and the optimizer makes its own groups.
    """
    model = adapter.model
    if optim.name in BITS:
        trainer.optimizer_cls_and_kwargs = (PagedAdamW, settings(optim, folder=trainer.run_folder))
    decaying = set(trainer.get_decay_parameter_names(model))
    no_decay = [parameter for name, parameter in model.named_parameters() if name not in decaying]
    made = groups(optim, adapter.named_parameters(), adapter.sites, no_decay=no_decay)
    if made is None:
        return ()
    own = trainer.optimizer_cls_and_kwargs
    cls, arguments = own or trainer.get_optimizer_cls_and_kwargs(trainer.args, model)  # type: ignore[arg-type]
    if is_optimizer_factory(cls) or arguments.keys() & {"params", "model", "optimizer_dict"}:
        raise ConfigError(
            f"optim.lora_plus: {optim.name} makes its own groups; use adamw_torch, or leave out optim.lora_plus"
        )
    # If the arguments contain "params", the Trainer uses them in place of its own groups.
    trainer.optimizer_cls_and_kwargs = (cls, {**arguments, "params": made})
    rates = tuple(
        Rates(g["name"], g["lr"], g["multiple"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in made
    )
    trainer.add_callback(KeepRatio(rates))
    return rates


class KeepRatio(TrainerCallback):
    """Raises ValueError before a step if the learning rates of the groups no longer have the ratios of LoRA+."""

    def __init__(self, rates: tuple[Rates, ...]) -> None:
        self.rates = rates

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise ValueError if the ratios of the groups are wrong, or differ from those in the checkpoint."""
        assert optimizer is not None
        there = {group["name"]: group["multiple"] for group in optimizer.param_groups}
        wrong = [
            f"{rates.name} had {there[rates.name]:g} times the learning rate and now has {rates.multiple:g} times"
            for rates in self.rates
            if not math.isclose(there[rates.name], rates.multiple, rel_tol=1e-6)
        ]
        if wrong:
            raise ValueError(
                f"cannot resume from the checkpoint with other learning rates: {'; '.join(wrong)}; set "
                f"optim.lora_plus to its former value, or choose another run.output"
            )
        check_rates(optimizer.param_groups)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise ValueError if the ratios of the groups are wrong."""
        assert optimizer is not None
        check_rates(optimizer.param_groups)


def settings(optim: OptimConfig, *, folder: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The arguments of PagedAdamW, except the parameters; only `paged_` optimizers have a budget and a folder."""
    paged = optim.name.startswith("paged_")
    return {
        "lr": optim.learning_rate,
        "weight_decay": optim.weight_decay,
        "bits": BITS[optim.name],
        "budget": bytes_of("optim.budget", optim.budget) if paged else None,
        "page": bytes_of("optim.page", optim.page),
        "folder": folder if paged else None,
    }


def paging(optimizer: object) -> Paging | None:
    """Paging statistics of a PagedAdamW, also if accelerate wraps it; None for any other optimizer."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner.paging if isinstance(inner, PagedAdamW) else None
