"""The loggers of transformers that a run may report to: their names and packages, what they record, start and end."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, integration_utils

from reparam.core.checks import nearest
from reparam.errors import ConfigError
from reparam.train import processes
from reparam.train.sections import RunConfig

if TYPE_CHECKING:
    from reparam.train.trainer import Resumable

EVENTS = "runs"  # the folder, in that of the run, for TensorBoard's files

PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
    "comet_ml": ("comet_ml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "dagshub": ("dagshub", "mlflow"),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "azure_ml": ("azureml.core",),
}
"""By the name of a logger, the packages of which it needs one (dagshub: both)."""
NONE = ("none", "all")
STARTED = ("wandb", "mlflow", "trackio")  # before scoring; others start with the first step


def check_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError for unknown loggers, and for those whose package is not installed, with how to install it."""
    problems = []
    for name in names:
        packages = PACKAGES.get(name)
        if packages is None:
            if name in NONE and len(names) == 1:
                continue
            problems.append(f"run.loggers: {name!r} is unknown{nearest(name, PACKAGES)}; one of {', '.join(PACKAGES)}")
            continue
        found = [package for package in packages if _installed(package)]
        if not found or (name == "dagshub" and len(found) < len(packages)):
            missing = next(package for package in packages if package not in found)
            problems.append(f"run.loggers: {name} needs the package {missing}: run  pip install {missing}")
    if problems:
        raise ConfigError("; ".join(problems))


def name_of(run: RunConfig) -> str:
    """The name of the run in the loggers."""
    return run.name or Path(run.output).resolve().name or "run"


def place_files(callbacks: Iterable[TrainerCallback], run: RunConfig) -> None:
    """Let TensorBoard write into runs/NAME in the run folder, unless the user set TENSORBOARD_LOGGING_DIR.

    TensorBoard shows the name of the folder as that of the run, and a resumed run goes on in it.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and not os.environ.get("TENSORBOARD_LOGGING_DIR"):
            folder = re.sub(r"[^\w.-]+", "-", name_of(run)).strip(".-")
            callback.logging_dir = str(Path(run.output) / EVENTS / (folder or "run"))


def record(args: TrainingArguments, settings: Mapping[str, Any]) -> None:
    """Let the loggers record these settings, beside the arguments of transformers.

    Loggers take what they record from `args.to_dict()`.
    """
    theirs = args.to_dict
    args.to_dict = lambda: {**theirs(), **settings}  # type: ignore[method-assign]


@contextmanager
def reporting(trainer: Resumable) -> Iterator[None]:
    """Start `STARTED` before the block, and end them after it. Raises ConfigError if one cannot start.

    transformers would start them with the first step, after the base is scored, and leaves the run of Weights & Biases
    open, so that the next run in this process would go on in it.
    """
    processes.first(lambda: _start(trainer))
    failed = True
    try:
        yield
        failed = False
    finally:
        if "wandb" in (trainer.args.report_to or ()) and processes.rank() == 0:
            importlib.import_module("wandb").finish(exit_code=int(failed))


def _start(trainer: Resumable) -> None:
    named = {integration_utils.INTEGRATION_TO_CALLBACK[name]: name for name in STARTED}
    for callback in trainer.callback_handler.callbacks:
        if (name := named.get(type(callback))) is None:
            continue
        try:
            callback.setup(trainer.args, trainer.state, trainer.model)
        except Exception as error:  # loggers raise errors of all kinds: no login, no server, a store they cannot open
            raise ConfigError(
                f"run.loggers: {name} cannot start: {' '.join(str(error).split())}; mend its settings, or leave it out"
            ) from error


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that a submodule is in
        return False
