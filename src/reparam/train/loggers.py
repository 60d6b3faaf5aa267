"""The loggers of transformers that a run may report to: their names and packages, and the name of the run in them."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from reparam.core.checks import nearest
from reparam.errors import ConfigError
from reparam.train.sections import RunConfig

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


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that a submodule is in
        return False
