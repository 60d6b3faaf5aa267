"""A run on a vision-language model: its processor, and the settings that it does not support."""

from __future__ import annotations

from transformers import AutoConfig

from reparam.errors import ConfigError
from reparam.hf.processors import load_processor, sees
from reparam.images.seeing import Seeing
from reparam.train import processes
from reparam.train.config import Config


def seeing_of(config: Config) -> Seeing | None:
    """What makes the inputs of a run on a vision-language model; None if the base reads text alone.

    Raises ConfigError for settings that such runs do not support, and BaseError if the base has no processor.
    """
    path, revision = config.base.path, config.base.revision
    if not sees(path, revision=revision):
        return None
    check(config)
    settings = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    return Seeing(load_processor(path, revision=revision), {}, config=settings)


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
