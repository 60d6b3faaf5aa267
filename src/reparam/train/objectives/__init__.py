"""What a run trains for: `sft` (answers and texts), and preferences. One file for each objective.

Those for preferences are TRL's trainers. They are imported when they are asked for, because TRL is an extra.
"""

from __future__ import annotations

import importlib

from reparam.errors import ConfigError
from reparam.tasks import find_task
from reparam.train.config import Config
from reparam.train.objectives.objective import Objective
from reparam.train.objectives.tasks import ForTask


def objective_of(config: Config) -> Objective:
    """The objective that `run.objective` names. Raises ConfigError if TRL is needed and not installed."""
    name = config.run.objective
    if config.run.task != "causal":
        if name != "sft":
            raise ConfigError(
                f"run.objective: {name} is for causal language models; leave it out, or leave out run.task"
            )
        task = ForTask(find_task(config.run.task))
        task.check(config)
        return task
    try:
        found: Objective = importlib.import_module(f"reparam.train.objectives.{name}").OBJECTIVE
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("trl", "datasets"):
            raise
        raise ConfigError(
            f"run.objective: {name} needs TRL, which is not installed: pip install 'reparam[prefer]'"
        ) from None
    found.check(config)
    return found
