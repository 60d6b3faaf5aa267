"""The optimiser of a run: ours by its name, whatever transformers has by any other.

transformers knows our names as those of bitsandbytes' optimisers; ours stand in their place and need nothing installed.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from reparam.base import nearest
from reparam.optim import PagedAdamW, Paging
from reparam.train.config import ConfigError, OptimConfig

if TYPE_CHECKING:
    from reparam.train.trainer import Trainer

BITS = {"paged_adamw_32bit": 32, "paged_adamw_8bit": 8, "adamw_8bit": 8}
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def check(optim: OptimConfig) -> None:
    """Raise ConfigError for a name that nobody knows, and for settings that our optimisers would refuse."""
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


def install(trainer: Trainer, optim: OptimConfig) -> None:
    """Let the Trainer make our optimiser if its name is one of ours, over the groups that it makes for any other.

    Those are two: weight decay is not for biases and norms. Pages of a CPU go to a file in the run folder.
    """
    if optim.name in BITS:
        trainer.optimizer_cls_and_kwargs = (PagedAdamW, settings(optim, folder=trainer.run_folder))


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
    """What our optimiser's pager has done, also through accelerate's wrapper; None for other optimisers."""
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
