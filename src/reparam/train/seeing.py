"""A run on a vision-language model: its processor, and the settings that it does not support."""

from __future__ import annotations

from reparam.errors import ConfigError
from reparam.hf.processors import sees
from reparam.images import seeing
from reparam.train import processes
from reparam.train.config import Config


def seeing_of(config: Config) -> seeing.Seeing | None:
    """What makes the inputs of a run on a vision-language model; None if the base reads text alone.

    Raises ConfigError for settings that such runs do not support, and BaseError if the base has no processor.
    """
    found = seeing.seeing_of(config.base.path, revision=config.base.revision)
    if found is not None:
        check(config)
    return found


def check(config: Config) -> None:
    """Raise ConfigError for settings that a run on a vision-language model does not support."""
    data, run = config.data, config.run
    unsupported = {
        "data.packing": data.packing,
        "data.streaming": data.streaming,
        "data.too_long": data.too_long == "split",
        "method.name": not config.method.changes_weights or config.method.known_tasks is not None,
        "run.objective": run.objective != "sft",
    }
    if wrong := [key for key, changed in unsupported.items() if changed]:
        what = {"method.name": f" {config.method.name}", "run.objective": f" {run.objective}"}.get(wrong[0], "")
        raise ConfigError(
            f"{wrong[0]}: training of a vision-language model does not support{what or ' it'}; leave it out"
        )
    if processes.count() > 1:
        raise ConfigError("training of a vision-language model runs in one process: call it without torchrun")


def check_base(config: Config) -> None:
    """Raise ConfigError for settings that the base does not support, because it is a vision-language model."""
    if sees(config.base.path, revision=config.base.revision):
        check(config)
