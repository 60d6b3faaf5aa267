"""The optimizer of a run: ours by its name, whatever transformers has by any other; and LoRA+'s groups for any of them.

transformers knows our names as those of bitsandbytes' optimizers; ours stand in their place and need nothing installed.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
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
from reparam.train.config import OptimConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from reparam.adapter.adapter import Adapter
    from reparam.train.trainer import Trainer

BITS = {"paged_adamw_32bit": 32, "paged_adamw_8bit": 8, "adamw_8bit": 8}
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclasses.dataclass(frozen=True)
class Rates:
    """One of LoRA+'s groups, as it begins."""

    name: str
    rate: float
    multiple: float
    """The rate as a multiple of the learning rate."""
    weight_decay: float
    parameters: int
    """How many numbers it trains."""


def check_optimizer(optim: OptimConfig) -> None:
    """Raise ConfigError for a name that nobody knows, and for settings that our optimizers would refuse."""
    kinds = (("name", optim.name, OptimizerNames), ("schedule", optim.schedule, SchedulerType))
    for key, value, known in kinds:
        names = [member.value for member in known]
        if value not in names:
            raise ConfigError(f"optim.{key}: transformers knows no {value!r}{nearest(value, names)}")
    if optim.name in BITS:
        given = settings(optim, folder=None)
        try:
            PagedAdamW([torch.zeros(1)], **given)  # it holds no states until its first step
        except ValueError as error:
            raise ConfigError(f"optim: {error}") from None
    idle = [
        key
        for key in ("lora_plus_embedding", "lora_plus_vectors")
        if optim.lora_plus is None and getattr(optim, key) != getattr(OptimConfig, key)
    ]
    if idle:
        raise ConfigError(f"optim.{idle[0]} does nothing without optim.lora_plus: set that too, 16 is usual")
    a, b = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1, 1))
    groups(optim, [("A", a, "in"), ("B", b, "out")], {})


def groups(
    optim: OptimConfig,
    parameters: Iterable[tuple[str, nn.Parameter, Role | None]],
    sites: Mapping[str, Site],
    *,
    no_decay: Iterable[nn.Parameter] | None = None,
) -> list[dict[str, Any]] | None:
    """LoRA+'s groups; None where it is off. Raises ConfigError for what cannot be."""
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


def install_optimizer(trainer: Trainer, optim: OptimConfig, adapter: Adapter) -> tuple[Rates, ...]:
    """Let the Trainer make our optimizer if its name is one of ours, over LoRA+'s groups if that is on.

    Otherwise over those that it makes, which are two: weight decay is not for biases and norms; LoRA+ divides these
    two further. Pages of a CPU go to a file in the run folder. Returns the rates of LoRA+'s groups.

    Raises ConfigError when transformers' optimizer of this name chooses its groups itself.
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
        raise ConfigError(f"optim.lora_plus: {optim.name} chooses its groups itself; use adamw_torch, or leave it out")
    # The Trainer takes "params" for groups that replace its own, as it does for optimizers that come with theirs.
    trainer.optimizer_cls_and_kwargs = (cls, {**arguments, "params": made})
    rates = tuple(
        Rates(g["name"], g["lr"], g["multiple"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in made
    )
    trainer.add_callback(KeepRatio(rates))
    return rates


class KeepRatio(TrainerCallback):
    """Ends a run, before the step, whose groups have not the rates that LoRA+ gave them, in proportion."""

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
        """Raises ValueError as `check_rates` does, and when the checkpoint that was read has other proportions."""
        assert optimizer is not None
        there = {group["name"]: group["multiple"] for group in optimizer.param_groups}
        wrong = [
            f"{rates.name} had {there[rates.name]:g} times the learning rate, and has {rates.multiple:g} now"
            for rates in self.rates
            if not math.isclose(there[rates.name], rates.multiple, rel_tol=1e-6)
        ]
        if wrong:
            raise ValueError(
                f"cannot go on from the checkpoint with other rates: {'; '.join(wrong)}; set "
                f"optim.lora_plus as it was, or another run.output"
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
        """Raises ValueError as `check_rates` does."""
        assert optimizer is not None
        check_rates(optimizer.param_groups)


def settings(optim: OptimConfig, *, folder: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The arguments of PagedAdamW but for the parameters; only `paged_` names have a budget."""
    paged = optim.name.startswith("paged_")
    return {
        "lr": optim.learning_rate,
        "weight_decay": optim.weight_decay,
        "bits": BITS[optim.name],
        "budget": bytes_of("budget", optim.budget) if paged else None,
        "page": bytes_of("page", optim.page),
        "folder": folder if paged else None,
    }


def paging(optimizer: object) -> Paging | None:
    """What our optimizer's pager has done, also through accelerate's wrapper; None for other optimizers."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner.paging if isinstance(inner, PagedAdamW) else None


def bytes_of(key: str, value: int | str) -> int:
    """A number of bytes as it is written in a configuration. Raises ConfigError for anything else.

    >>> bytes_of("budget", "64MiB"), bytes_of("budget", 4096), bytes_of("budget", "4096")
    (67108864, 4096, 4096)
    """
    match = re.fullmatch(r"(\d+) ?(|KiB|MiB|GiB)", str(value).strip())
    if match is None:
        raise ConfigError(f"optim.{key}: {value!r} is no number of bytes; write 67108864, 65536KiB, 64MiB or 1GiB")
    return int(match[1]) * _UNITS[match[2]]
