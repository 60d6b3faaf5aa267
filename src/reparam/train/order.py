"""The order of the training rows, which must be the same in a resumed run."""

from collections.abc import Iterator, Sized
from typing import Any, cast

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import Dataset, RandomSampler, Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig, LengthGroupedSampler


class ByEpoch(Sampler[int]):
    """Samples rows grouped by length, in an order that depends only on the seed and the epoch.

    transformers draws this order from torch's global generator at the start of an epoch. A checkpoint in the middle of
    the epoch holds a later state of that generator, from which the order cannot be drawn again.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0
        sampler.generator = torch.Generator()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; accelerate's data loader calls this at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator.manual_seed(self.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class Filled(Sampler[int]):
    """A random order that several processes share, filled up so that all of them get equally many full batches.

    The indices that fill it up are the number of rows; `WithEmpty` holds an example without loss there. accelerate
    would take rows from the beginning again, which would count twice. The order of the rows is that of one process.
    """

    def __init__(self, sampler: Sampler[int], rows: Sized, *, multiple: int, seed: int) -> None:
        if isinstance(sampler, RandomSampler):
            sampler = SeedableRandomSampler(rows, generator=torch.Generator(), data_seed=seed)
        self.sampler, self.rows, self.multiple = sampler, rows, multiple

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; accelerate's data loader calls this at the start of each epoch."""
        self.sampler.set_epoch(epoch)  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from [len(self.rows)] * (len(self) - len(self.rows))

    def __len__(self) -> int:
        return -(-len(self.rows) // self.multiple) * self.multiple


class WithEmpty(Dataset[Any]):
    """A dataset whose index after the last one is an example without loss: the first example, with other labels."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if index < len(self.rows):
            return self.rows[index]
        first = self.rows[0]
        labels = first["labels"]
        none = torch.full_like(labels, -100) if isinstance(labels, Tensor) else [-100] * len(labels)
        return {**first, "labels": none}


def begin_epoch(loader: Any, epoch: int) -> None:
    """Set the epoch of the sampler in a data loader.

    In a resumed epoch, transformers wraps the loader's batch sampler to skip what was trained. With several processes
    there are then two wrappers, and its own `set_epoch` does not reach the sampler.
    """
    inner = loader
    while getattr(inner, "batch_sampler", None) is not None:
        inner = inner.batch_sampler
    if hasattr(sampler := getattr(inner, "sampler", None), "set_epoch"):
        sampler.set_epoch(epoch)  # type: ignore[union-attr]


def row_order(args: TrainingArguments, rows: int) -> dict[str, Any]:
    """All settings that determine the order of the rows, by name; saved in checkpoints and compared on resume."""
    return {
        "number of training rows": rows,
        "train_batch_size": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "number of processes": args.world_size,
        "data_seed": args.data_seed,
        "train_sampling_strategy": str(args.train_sampling_strategy),
        "dataloader_drop_last": args.dataloader_drop_last,
    }


def unsupported(args: TrainingArguments, rows: Any) -> list[str]:
    """Arguments with which a resumed run would differ or a checkpoint would be lost, each with the reason."""
    refused = {
        "push_to_hub": (args.push_to_hub, "is not supported; upload the result after training"),
        "save_only_model": (args.save_only_model, "a checkpoint without optimizer state cannot be resumed"),
        "ignore_data_skip": (args.ignore_data_skip, "a resumed run would see the same rows again"),
        "auto_find_batch_size": (
            args.auto_find_batch_size,
            "a resumed run could find another batch size; set per_device_train_batch_size",
        ),
        "enable_jit_checkpoint": (args.enable_jit_checkpoint, "not needed: SIGTERM saves a checkpoint anyway"),
        "dataloader_persistent_workers": (
            args.dataloader_persistent_workers,
            "persistent workers get their seed once per process, so a resumed run would draw other random numbers",
        ),
        "use_seedable_sampler=False": (
            not cast(AcceleratorConfig, args.accelerator_config).use_seedable_sampler,
            "the order of the rows would be lost when a run stops in the middle of an epoch",
        ),
        "save_total_limit=1 with metric_for_best_model": (
            args.save_total_limit == 1 and args.metric_for_best_model is not None,
            "the best checkpoint would replace the newest one, which a resumed run needs; use 2",
        ),
    }
    problems = [f"{name}: {why}" for name, (given, why) in refused.items() if given]
    return problems + ([] if hasattr(rows, "__len__") else ["train_dataset has no length"])
