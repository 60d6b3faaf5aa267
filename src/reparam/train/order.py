"""What the order of the training rows depends on, so that a resumed run sees the same ones."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig, LengthGroupedSampler


class ByEpoch(Sampler[int]):
    """Order by length that follows from the seed and the epoch alone.

    transformers draws it from torch's global generator when an epoch starts; a checkpoint from the middle of the epoch
    has a later state of it.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0
        sampler.generator = torch.Generator()

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator.manual_seed(self.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


def row_order(args: TrainingArguments, rows: int) -> dict[str, Any]:
    """Return all that decides which rows come when, by name; stored in checkpoints and compared on resume."""
    return {
        "number of training rows": rows,
        "train_batch_size": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "number of processes": args.world_size,
        "data_seed": args.data_seed,
        "train_sampling_strategy": str(args.train_sampling_strategy),
        "dataloader_drop_last": args.dataloader_drop_last,
    }


def unsupported(args: TrainingArguments) -> list[str]:
    """Return what in the arguments would make a resumed run another run, or lose a checkpoint, each with the reason."""
    refused = {
        "push_to_hub": (args.push_to_hub, "push the result after training"),
        "save_only_model": (args.save_only_model, "a checkpoint without optimizer state cannot be resumed"),
        "ignore_data_skip": (args.ignore_data_skip, "a resumed run would see the same rows again"),
        "auto_find_batch_size": (args.auto_find_batch_size, "a resumed run could get another batch size; set one"),
        "enable_jit_checkpoint": (args.enable_jit_checkpoint, "SIGTERM leads to a checkpoint without it"),
        "dataloader_persistent_workers": (
            args.dataloader_persistent_workers,
            "such workers draw their seeds once per process, so the random numbers of a resumed run would differ",
        ),
        "use_seedable_sampler=False": (
            not cast(AcceleratorConfig, args.accelerator_config).use_seedable_sampler,
            "the order of the rows would be lost when a run stops in the middle of an epoch",
        ),
        "save_total_limit=1 with metric_for_best_model": (
            args.save_total_limit == 1 and args.metric_for_best_model is not None,
            "the newest checkpoint would be deleted in favor of the best one; use 2",
        ),
    }
    return [f"{name}: {why}" for name, (given, why) in refused.items() if given]
