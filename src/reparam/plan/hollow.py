"""A model without values: built from its configuration, quantized and adapted as in training, in no memory.

The parameters and buffers are fake tensors of torch: they have shapes, dtypes and storages of a size, and no numbers.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from reparam.adapter.adapter import Adapter
from reparam.adapter.quantize import quantize
from reparam.adapter.untie import untie
from reparam.errors import ConfigError
from reparam.hf.folder import check_path
from reparam.hf.gguf import tokenizer_folder_of
from reparam.hf.models import storage_config_of
from reparam.hf.sound import check_config, from_files
from reparam.hf.tasks import CLASSES, CLASSIFYING, check_fits, set_head
from reparam.io.head import Head
from reparam.train.base import BaseConfig
from reparam.train.config import Config
from reparam.train.model import attached


class Hollow(NamedTuple):
    """An adapted model without values, and the mode in which it runs."""

    model: nn.Module
    adapter: Adapter
    mode: FakeTensorMode
    frozen: int
    """Bytes of the base's parameters and buffers."""
    trained: int
    """Bytes of the parameters that train, without those of a base that trains whole."""
    unpacked: int
    """Bytes of the largest quantized matrix once it is dequantized in the compute dtype; 0 if none is quantized."""


def config_of(base: BaseConfig) -> Any:
    """transformers' configuration of the base; weights are not read. Raises BaseError if there is none."""
    with from_files(base.path, "causal language model"):
        place = tokenizer_folder_of(base.path, revision=base.revision)  # of a GGUF file
    check_path(place)
    with from_files(base.path, "causal language model"):
        config = AutoConfig.from_pretrained(place, revision=base.revision or "main", trust_remote_code=False)
        check_config(config)
    return config


def head_of(config: Config) -> Head | None:
    """What the model is for. A classifier is planned with two classes: only the data tell their number."""
    task = config.run.task
    labels = ("0", "1") if task in CLASSIFYING else ()
    return None if task == "causal" else Head(task, labels, pooling=config.run.pooling)


def layers_of(config: Any) -> int | None:
    """The number of layers, if all layers are of one kind; None if they are not, or if it is not known."""
    count = getattr(config, "num_hidden_layers", None)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    return count if isinstance(count, int) and len(set(kinds)) <= 1 else None


def with_layers(config: Any, count: int) -> Any:
    """The same configuration with another number of layers."""
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = count
    for name in ("layer_types", "layers_block_type"):
        if getattr(changed, name, None):
            setattr(changed, name, getattr(changed, name)[:1] * count)
    return changed


@contextmanager
def hollow(config: Config, architecture: Any) -> Iterator[Hollow]:
    """Build the model of this configuration with this architecture.

    Raises ConfigError for a base that is quantized in an unknown way, and the errors of `attach` and `quantize`.
    """
    base = config.base
    dtype = getattr(torch, base.dtype) if base.dtype != "auto" else (architecture.dtype or torch.float32)
    storage, targets = base.quantization(), base.quantized
    if getattr(architecture, "quantization_config", None) is not None:
        stored = storage_config_of(architecture)
        if stored is None:
            raise ConfigError(
                f"{base.path}: is quantized in a way that reparam plan does not know; use the original model"
            )
        storage, targets = stored.storage, stored.targets
        architecture = copy.deepcopy(architecture)
        del architecture.quantization_config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training gives these warnings, once
        with torch.device("meta"):
            head = head_of(config)
            architecture = copy.deepcopy(architecture)
            if head is not None:
                check_fits(architecture, head)
                set_head(architecture, head)
            model = CLASSES[config.run.task].from_config(architecture, dtype=dtype, trust_remote_code=False)
        if storage is not None:
            quantize(model, storage, targets=targets)
        if base.untie:
            untie(model)
        adapter = attached(config, model, config.method, head)
        if config.run.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _swap(model)
        own = {id(p) for p in adapter.parameters()}
        every = [*model.parameters(), *model.buffers()]
        sites = [m.frozen for m in adapter.modules.values() if m.frozen.dense_or_none is None]
        width = 2 if dtype != torch.float32 or config.run.precision == "bfloat16" else 4
        yield Hollow(
            model.train(),
            adapter,
            mode,
            sum(t.nbytes for t in every if id(t) not in own),
            sum(t.nbytes for t in every if id(t) in own),
            max((width * w.out_features * w.in_features for w in sites), default=0),
        )


def _swap(model: nn.Module) -> None:
    """Replace all tensors on `meta` by fake ones on the CPU; those that are shared stay shared."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            trains = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(like, requires_grad=tensor.requires_grad) if trains else like
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = fake(tensor)  # type: ignore[assignment]
