"""One of many training runs: returns a failure as a result, and raises Stopped after a signal to end all runs."""

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
    """Train, and return the result or, if the run failed, the reason as one line.

    Failures are a loss or gradient that is not finite, an adapter that learned nothing, and a lack of device memory.
    Afterwards the checkpoints are deleted and, unless `keep_adapter` is true, the adapter. Raises Stopped after a
    signal (the checkpoints stay), and ValueError for errors that the user can fix.
    """
    found: Result | str
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # every run would repeat the same warnings
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
