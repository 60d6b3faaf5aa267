"""The configuration of a stage: that of training, and a section [vision]."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from reparam.core.checks import finite, whole
from reparam.core.plain import wrong_types
from reparam.errors import ConfigError
from reparam.train.config import Config, build, dump, resolve
from reparam.train.documents import read_tables
from reparam.vision.patches import Vision

Stage = Literal["pretrain", "tune"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """How a language model learns to see. A model that sees already keeps its own settings."""

    patch: int = 14
    """Side of a patch, in pixels."""
    size: int = 448
    """Side of the square that images are resized to, in pixels; a multiple of vision.patch."""
    width: int = 1536
    """Width of the embedding of patches."""
    channels: int = 3
    """Channels of an image: 3 for colors, or 1 for gray."""
    mean: tuple[float, ...] = ()
    """Mean that is subtracted from pixels in 0 ... 1: one number, or one for each channel. By default CLIP's."""
    std: tuple[float, ...] = ()
    """Standard deviation by which pixels are divided: one number, or one for each channel. By default CLIP's."""
    blocks: int = 0
    """Number of blocks, from the first one, that get adapters; 0 for all of them."""
    mask: Literal["image", "causal"] = "image"
    """Whether the tokens of an image see each other (image), or those before them alone (causal)."""
    teacher: str | None = None
    """Vision transformer that teaches the blocks: a folder or a hub id of CLIP, SigLIP, DINOv2, AIMv2 or others."""
    pairs: Literal["aligned", "upstream"] = "aligned"
    """Which states meet: aligned: outputs of the same blocks; upstream: as in the code of the paper's authors, what
    enters a block meets the output of the teacher's block."""
    weight: float = 1.0
    """Weight of the loss of the teacher beside that of the language model."""

    def __post_init__(self) -> None:
        if problems := wrong_types(self):
            raise ConfigError("; ".join(f"vision.{problem}" for problem in problems))
        if not whole(self.blocks, 0):
            raise ConfigError(f"vision.blocks: {self.blocks}: expected a whole number of at least 0")
        if not finite(self.weight) or self.weight <= 0:
            raise ConfigError(f"vision.weight: {self.weight}: expected a finite number above 0")
        if self.channels not in (1, 3):
            raise ConfigError(f"vision.channels: {self.channels}: expected 1 or 3")
        if self.teacher is None and (self.pairs, self.weight) != ("aligned", 1.0):
            raise ConfigError("vision.pairs and vision.weight have no effect without vision.teacher")
        try:
            self.pixels()
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def pixels(self) -> Vision:
        """The settings of the patch embedding."""
        usual = Vision()
        gray = self.channels == 1
        mean = self.mean or ((sum(usual.mean) / 3,) if gray else usual.mean)
        std = self.std or ((sum(usual.std) / 3,) if gray else usual.std)
        return Vision(self.patch, self.size, self.width, self.channels, mean, std)


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """The whole configuration of a stage."""

    stage: Stage
    train: Config
    vision: VisionConfig

    def dump(self, *, absolute: bool = False) -> str:
        """As TOML, from which `resolve_stage` reads an equal one."""
        import tomli_w

        given = {key: value for key, value in dataclasses.asdict(self.vision).items() if value is not None}
        tail = tomli_w.dumps({"vision": given}) if self.stage == "pretrain" else ""
        return dump(self.train, absolute=absolute) + ("\n" + tail if tail else "")


def resolve_stage(stage: Stage, file: str | Path | None, overrides: Mapping[str, Any]) -> StageConfig:
    """Read the configuration of a stage from a file, if one is given, and apply overrides by dotted key.

    Pre-training has the defaults of the paper: LoRA of scale 1, a constant rate after a warm-up, and rows of up to 2048
    tokens. Raises ConfigError as `reparam.train.config.resolve` does, for keys of [vision] that are unknown or out of
    range, for such keys in `tune`, whose model has its own, and for settings that have no effect on images.
    """
    tables = read_tables(Path(file)) if file is not None else {}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    own = tables.pop("vision", {})
    where = f"{file}: " if file is not None else ""
    if stage == "tune" and own:
        raise ConfigError(f"{where}vision.{next(iter(own))}: the model that sees has its own; leave it out")
    problems: list[str] = []
    vision = build(VisionConfig, own, "vision", problems)
    if problems:
        raise ConfigError(where + "; ".join(problems))
    lora = str(tables.get("method", {}).get("name", "lora")) == "lora"
    usual: dict[str, dict[str, Any]] = {"data": {"max_length": 2048}}
    if stage == "pretrain":
        usual |= {"optim": {"schedule": "constant_with_warmup"}, "method": {"scaling": "none", "r": 64} if lora else {}}
    for section, values in usual.items():
        for key, value in values.items():
            if not (key == "scaling" and "alpha" in tables.get("method", {})):
                tables.setdefault(section, {}).setdefault(key, value)
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    found = resolve(None, flat)
    _check(found, where)
    return StageConfig(stage, found, vision)


def _check(config: Config, where: str) -> None:
    """Raise ConfigError for settings that rows with images do not support."""
    run, data, adapter = config.run, config.data, config.adapter
    unsupported = {
        "run.objective": run.objective != "sft",
        "run.metric": run.metric not in ("loss", "exact_match"),
        "run.group_by_length": run.group_by_length,
        "data.packing": data.packing,
        "data.streaming": data.streaming,
        "data.too_long": data.too_long == "split",
        "adapter.start": adapter.start is not None,
        "adapter.bias": adapter.bias,
        "adapter.modules_to_save": bool(adapter.modules_to_save),
        "adapter.tie": adapter.tie,
    }
    if wrong := [key for key, changed in unsupported.items() if changed]:
        raise ConfigError(f"{where}{wrong[0]}: the training of models that see does not support it; leave it out")
    if config.method.known_tasks is not None:
        raise ConfigError(f"{where}method.name: {config.method.name} depends on tasks, so it cannot be merged")
