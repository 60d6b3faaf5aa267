"""A training run that is one of many: that it fails is a result, and a signal ends all of them."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch

from reparam.errors import NothingLearned, Stopped
from reparam.train.config import Config
from reparam.train.job import Result
from reparam.train.run import train
from reparam.train.show import Show


def attempt(config: Config, *, show: Show, keep_adapter: bool) -> Result | str:
    """What a run produced; or why it failed: a number that is not finite, nothing learned, no memory.

    Checkpoints are removed at its end, and the adapter unless it is to be kept. Raises Stopped after a signal, with
    the checkpoint in its place, and ValueError for what the user can mend.
    """
    found: Result | str
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of many runs, each would repeat what was said once
            found = train(config, show=show)
    except (FloatingPointError, NothingLearned, torch.OutOfMemoryError) as error:
        found = str(error).split("\n")[0]
    else:
        if found.signal is not None:
            raise Stopped(found.signal)
    folder = Path(config.run.output)
    for left in [*folder.glob("checkpoint-*"), *([] if keep_adapter else [folder / "adapter"])]:
        shutil.rmtree(left, ignore_errors=True)
    return found
