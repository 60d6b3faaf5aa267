"""The inputs of a stage: the model that sees, the rows, the teacher, and what determines the result."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from reparam.core.base import Role
from reparam.data.batches import Encoded, padding_id
from reparam.errors import ConfigError, DataError
from reparam.hf.models import check_not_base, load_tokenizer, vocabulary
from reparam.images.rows import ImageRows, Images
from reparam.train import optimizer
from reparam.train.config import check_inputs
from reparam.train.data import Data, read_data
from reparam.train.identity import identity
from reparam.train.job import Job
from reparam.train.loggers import check_loggers
from reparam.train.model import loaded
from reparam.train.reading import tokenizer_of
from reparam.vision.config import StageConfig
from reparam.vision.files import assembled
from reparam.vision.found import LANGUAGE, vora_folder
from reparam.vision.model import VoRA
from reparam.vision.processor import Processor, mark_id, marked
from reparam.vision.rows import Seen
from reparam.vision.teachers import load_teacher


@dataclasses.dataclass(frozen=True)
class VisionJob:
    """The inputs of a stage."""

    stage: StageConfig
    vora: VoRA
    job: Job
    """The same run as one on text: its rows are encoded with one token for each image."""
    train: Seen
    valid: Seen
    images: Mapping[str, Images]
    """The images of each row, by its place."""
    teacher: str | None
    """SHA-256 of the teacher's tensors."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings and digests that determine the result, by name."""
        found = identity(self.job)
        if self.stage.stage == "pretrain":
            given = dataclasses.asdict(self.stage.vision)
            teacher = given.pop("teacher")
            found |= {f"vision.{key}": list(v) if isinstance(v, tuple) else v for key, v in given.items()}
            found["vision.teacher"] = teacher is not None
        found["stage"] = self.stage.stage
        found["content of the patch embedding"] = _digest(sorted(self.vora.embedding.state_dict().items()))
        found["content of vision.teacher"] = self.teacher
        found["content of the images"] = _digest(sorted((place, each.digest) for place, each in self.images.items()))
        return found


def prepare(stage: StageConfig) -> VisionJob:
    """Load and check everything that a stage needs. Writes nothing. Raises ValueError for errors the user can fix."""
    config = stage.train
    check_inputs(config)
    optimizer.check_optimizer(config.optim)
    check_loggers(config.run.loggers)
    check_not_base(config.run.output, config.base.path)
    set_seed(config.run.seed)
    if stage.stage == "pretrain":
        if vora_folder(config.base.path) is not None:
            raise ConfigError(
                f"base.path: {config.base.path} sees already; train it further with `reparam vision tune`"
            )
        tokenizer = tokenizer_of(config)
    else:
        tokenizer = _tokenizer_that_sees(config.base.path)
    mark = marked(tokenizer)
    images: dict[str, Images] = {}
    cached = dataclasses.replace(config, data=dataclasses.replace(config.data, cache="off"))
    data = read_data(cached, mark, reading=functools.partial(ImageRows, found=images))
    if stage.stage == "pretrain" and not images:
        raise DataError([f'{", ".join(config.data.sources())}: no row has an image; give rows with "image"'])
    vora = _first(stage) if stage.stage == "pretrain" else _further(stage)
    _check_vocabulary(data, vocabulary(vora.language), mark_id(mark))
    vora.processor = Processor(tokenizer, vora.vision, data.prompt_format)
    assert vora.adapter is not None
    vora.adapter.prompt_format = data.prompt_format
    taught = None
    if stage.vision.teacher is not None:
        teacher = load_teacher(stage.vision.teacher)
        vora.distill(teacher, pairs=stage.vision.pairs, weight=stage.vision.weight, seed=config.run.seed)
        taught = _digest((name, tensor) for name, tensor in sorted(teacher.model.state_dict().items()))
    assert isinstance(data.train, Encoded)
    assert isinstance(data.valid, Encoded)
    most = getattr(vora.config.get_text_config(), "max_position_embeddings", None)
    settings = {
        "mark": mark_id(mark),
        "fill": padding_id(tokenizer),
        "longest": min(config.data.max_length, most or config.data.max_length),
    }
    train, valid = (Seen(rows, images, vora.vision, **settings) for rows in (data.train, data.valid))
    optimizer.groups(config.optim, Trained(vora).named_parameters(), vora.adapter.sites)
    job = Job(config, vora.language, mark, vora.adapter, data.train, data.valid, data.held_out)
    return VisionJob(stage, vora, job, train, valid, images, taught)


class Trained:
    """All that a stage trains, as the optimizer's groups ask for it: the adapter, the patch embedding, the heads."""

    def __init__(self, vora: VoRA) -> None:
        assert vora.adapter is not None
        self.model, self.adapter, self.sites = vora, vora.adapter, vora.adapter.sites

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter, Role | None]]:
        """Name, parameter and role; the role of the patch embedding and of heads is None."""
        yield from self.adapter.named_parameters()
        for name, parameter in self.model.trained().items():
            if not name.startswith("adapter."):
                yield name, parameter, None


def _first(stage: StageConfig) -> VoRA:
    """A language model that begins to see."""
    config = stage.train
    model = loaded(config.base)
    depth = model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
    try:
        return VoRA(
            model,
            vision=stage.vision.pixels(),
            blocks=stage.vision.blocks or depth,
            method=config.method,
            targets=config.adapter.targets or config.method.default_targets,
            mask=stage.vision.mask,
            seed=config.run.seed,
        )
    except ValueError as error:
        raise type(error)(str(error).replace("blocks=", "vision.blocks: ")) from None


def _tokenizer_that_sees(path: str) -> PreTrainedTokenizerBase:
    folder = vora_folder(path)
    if folder is None:
        raise ConfigError(
            f"base.path: {path} holds no model that sees; teach one with `reparam vision pretrain`, and merge it with "
            f"`reparam vision merge`"
        )
    if not (folder / LANGUAGE).is_dir():
        raise ConfigError(f"base.path: the adapter in {path} is not merged; merge it with `reparam vision merge`")
    return load_tokenizer(str(folder / LANGUAGE))


def _further(stage: StageConfig) -> VoRA:
    """A model that sees, with a new adapter on all its blocks."""
    config, base = stage.train, stage.train.base
    folder = vora_folder(base.path)
    assert folder is not None
    language = loaded(dataclasses.replace(base, path=str(folder / LANGUAGE)))
    vora = assembled(folder, language, load_tokenizer(str(folder / LANGUAGE)))
    targets = config.adapter.targets or config.method.default_targets
    vora.attach(config.method, targets=targets, everywhere=True)
    return vora


def _check_vocabulary(data: Data, size: int, mark: int) -> None:
    """Raise DataError if a row has a token that the model lacks, besides the place of an image."""
    for rows in (data.train, data.valid):
        assert isinstance(rows, Encoded)
        ids = rows.ids
        if bool(((ids >= size) & (ids != mark)).any()):
            raise DataError(
                [f"the tokenizer has token ids of at least {size}, and the model only {size} tokens; use its tokenizer"]
            )


def _digest(parts: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for name, value in parts:
        found.update(str(name).encode())
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        found.update(value.encode() if isinstance(value, str) else value)
    return found.hexdigest()
