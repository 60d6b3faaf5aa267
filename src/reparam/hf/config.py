"""How a quantized model is described in `config.json` and in its files: our own way, and bitsandbytes'.

    {"quant_method": "reparam", "storage": "nf4", "block": 64, "double": true, "targets": ["all-linear"]}

The tensors of NF4 are those of bitsandbytes (`io/bitsandbytes.py`), so that only this entry differs between a folder of
ours and one that transformers reads with bitsandbytes; those of int8 are in `io/int8.py`, of any
other storage in `io/layouts.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantization_config
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from reparam.core.base import Storage
from reparam.core.registry import STORAGES, find_storage
from reparam.errors import FormatError
from reparam.io.layouts import layout_of
from reparam.io.plain import decode
from reparam.io.record import listed
from reparam.sites import targets as targets_
from reparam.sites.module import Adapted, Replaced
from reparam.sites.walk import storages_in, walk
from reparam.weights.int8 import Int8
from reparam.weights.nf4 import NF4

METHOD = "reparam"


@register_quantization_config(METHOD)
class StorageConfig(QuantizationConfigMixin):
    """A storage and where it goes, in transformers' terms; made by its subclasses and by `config_for`."""

    def __init__(self, storage: Storage, targets: targets_.Targets) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # of an enum of their own methods
        self.storage = storage
        self.targets = (targets,) if isinstance(targets, str) else tuple(targets)

    def to_dict(self) -> dict[str, Any]:
        """As it is written into `config.json`."""
        start = {"quant_method": METHOD, "storage": self.storage.name}
        return {**start, **self.storage.settings(), "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From what `to_dict` gave. Raises FormatError for keys and values that do not fit."""
        values = {key: value for key, value in config_dict.items() if key != "quant_method"}
        where = "config.json: quantization_config"
        name, targets = values.pop("storage", None), values.pop("targets", None)
        if not isinstance(name, str) or not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise FormatError(f"{where}: expected a storage by name and a list of targets, found {name!r}, {targets!r}")
        try:
            config = config_for(decode(find_storage(name), values, where), targets)
        except FormatError:
            raise
        except ValueError as error:
            raise FormatError(f"{where}: {error}") from None
        return (config, kwargs) if return_unused_kwargs else config


class NF4Config(StorageConfig):
    """Quantize into NF4 while loading: `block` and `double` as in `reparam.NF4`, `targets` as in `reparam.attach`.

    The output head and the embeddings stay as they are unless named. Raises ValueError for a bad block size.

    >>> NF4Config(block=128).to_dict()
    {'quant_method': 'reparam', 'storage': 'nf4', 'block': 128, 'double': True, 'targets': ['all-linear']}
    """

    def __init__(self, block: int = 64, *, double: bool = True, targets: targets_.Targets = ("all-linear",)) -> None:
        super().__init__(NF4(block, double), targets)


class Int8Config(StorageConfig):
    """Quantize into int8, one scale a row, while loading; `targets` as in `reparam.attach`."""

    def __init__(self, *, targets: targets_.Targets = ("all-linear",)) -> None:
        super().__init__(Int8(), targets)


def config_for(storage: Storage, targets: targets_.Targets) -> StorageConfig:
    """The configuration for a storage. Raises ValueError for the dense one, which quantizes nothing."""
    if storage.name == "dense":
        quantized = ", ".join(name for name in STORAGES if name != "dense")
        raise ValueError(f"dense is not quantized by transformers; the storages for it are {quantized}")
    if isinstance(storage, NF4):
        return NF4Config(storage.block, double=storage.double, targets=targets)
    return Int8Config(targets=targets) if isinstance(storage, Int8) else StorageConfig(storage, targets)


def config_of(model: nn.Module) -> StorageConfig:
    """What a quantized model's `config.json` is to say. Raises ValueError where matrices are in several storages."""
    held = storages_in(model)
    names = sorted({storage.name for storage in held.values()})
    if len(names) != 1:
        raise ValueError(f"the matrices are in {' and '.join(names) or 'no storage'}; a folder holds those of one")
    with warnings.catch_warnings():  # what has no matrix to quantize was said when it was quantized
        warnings.simplefilter("ignore")
        usual = targets_.resolve(model, "all-linear")
    return config_for(next(iter(held.values())), "all-linear" if set(usual) == set(held) else list(held))


def file_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors as they go into files. Raises ValueError while adapters are on it."""
    sites = {path: module for path, module in walk(model) if isinstance(module, Adapted | Replaced)}
    if any(isinstance(module, Replaced) or module.updates for module in sites.values()):
        raise ValueError(
            "the model has adapters on it, and its files would not hold them: save the adapter alone (adapter.save), "
            "and give a Trainer save_strategy='no'; or reparam.merge(model) first"
        )
    found = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if not any(key[:at] in sites for at, letter in enumerate(key) if letter == ".")
    }
    for path, module in sites.items():
        assert isinstance(module, Adapted)
        if module.frozen.dense_or_none is not None:
            found |= {f"{path}.{name}": tensor.detach() for name, tensor in module.stock().items()}
            continue
        found |= layout_of(module.frozen.storage).tensors_of_weight(module.frozen, path)
        if module.bias is not None:
            found[f"{path}.bias"] = module.bias.detach()
    return found


# ---- bitsandbytes


def from_bitsandbytes(values: Mapping[str, Any]) -> StorageConfig:
    """Our configuration for a folder that bitsandbytes wrote. Raises ValueError for LLM.int8 and FP4.

    It names no targets: what is quantized is what the files hold quantized.
    """
    kind = values.get("bnb_4bit_quant_type")
    if values.get("load_in_8bit") or values.get("_load_in_8bit"):
        raise ValueError("is LLM.int8 of bitsandbytes, which is not read; load the original model, storage int8")
    if kind != "nf4":
        raise ValueError(f"is {str(kind).upper()} of bitsandbytes, and only NF4 is read; load the original model")
    return NF4Config(double=bool(values.get("bnb_4bit_use_double_quant")), targets=())


def to_bitsandbytes(model: Any) -> dict[str, Any]:
    """The entry with which transformers and bitsandbytes load the model, adapters aside.

    Raises ValueError where bitsandbytes has no place for what is quantized: another storage, embeddings, or matrices
    that its list of skipped modules cannot tell from dense ones.
    """
    config = config_of(model)
    if config.storage.name != "nf4":
        raise ValueError(f"bitsandbytes has no {config.storage.name} like ours; quantize the model into nf4")
    held = storages_in(model)
    modules = dict(walk(model))
    problems = [f"{path} is an embedding" for path in held if targets_.sizes(modules[path])[0] == "embedding"]
    skipped = [path for path, module in modules.items() if type(module) is nn.Linear or isinstance(module, Conv1D)]
    unread = [*skipped, *(model._keep_in_fp32_modules or ())]
    problems += [f"{path} would be taken for a dense one" for path in held if not should_convert_module(path, unread)]
    if problems:
        raise ValueError(f"bitsandbytes could not read the model: {listed(problems)}; save it in the format 'reparam'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.storage.settings()["double"],
        bnb_4bit_compute_dtype=model.dtype,
        llm_int8_skip_modules=skipped,
    ).to_dict()
