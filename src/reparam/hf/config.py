"""The `quantization_config` of `config.json` in the formats of reparam and bitsandbytes, and the tensors in the files.

    {"quant_method": "reparam", "storage": "nf4", "block": 64, "double": true, "targets": ["all-linear"]}

Both formats store the tensors of NF4 as bitsandbytes does (`weights/bitsandbytes.py`), so that only this entry differs.
`weights/int8_files.py` defines the tensors of int8, `weights/layouts.py` those of any other storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantization_config
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from reparam.adapter.quantize import METHOD, entry_of, usual_targets
from reparam.core.base import Storage
from reparam.core.checks import listed
from reparam.core.plain import decode
from reparam.core.registry import STORAGES, find_storage
from reparam.errors import FormatError
from reparam.sites import targets as targets_
from reparam.sites.module import Adapted
from reparam.sites.replaced import Replaced
from reparam.sites.walk import storages_in, walk
from reparam.weights.int8 import Int8
from reparam.weights.nf4 import NF4


@register_quantization_config(METHOD)
class StorageConfig(QuantizationConfigMixin):
    """A storage and the modules to quantize with it, as a quantization config of transformers.

    Users create its subclasses; `config_for` returns one for any storage.
    """

    def __init__(self, storage: Storage, targets: targets_.Targets) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers declares an enum
        self.storage = storage
        self.targets = (targets,) if isinstance(targets, str) else tuple(targets)

    def to_dict(self) -> dict[str, Any]:
        """The entry for `config.json`."""
        return entry_of(self.storage, self.targets)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the entry that `to_dict` returned. Raises FormatError for unknown keys or storages and bad values."""
        values = {key: value for key, value in config_dict.items() if key != "quant_method"}
        where = "config.json: quantization_config"
        name, targets = values.pop("storage", None), values.pop("targets", None)
        if not isinstance(name, str) or not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise FormatError(
                f"{where}: expected the name of a storage and a list of targets, found {name!r}, {targets!r}"
            )
        try:
            config = config_for(decode(find_storage(name), values, where), targets)
        except FormatError:
            raise
        except ValueError as error:
            raise FormatError(f"{where}: {error}") from None
        return (config, kwargs) if return_unused_kwargs else config


class NF4Config(StorageConfig):
    """Quantize to NF4 while transformers loads the model (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

    `block` and `double` have the meaning they have in `reparam.NF4`, `targets` the meaning it has in `reparam.attach`.
    The default targets leave out the embeddings and the output head. Raises ValueError for an unsupported block size.

    >>> NF4Config(block=128).to_dict()
    {'quant_method': 'reparam', 'storage': 'nf4', 'block': 128, 'double': True, 'targets': ['all-linear']}
    """

    def __init__(self, block: int = 64, *, double: bool = True, targets: targets_.Targets = ("all-linear",)) -> None:
        super().__init__(NF4(block, double), targets)


class Int8Config(StorageConfig):
    """Quantize to int8, with one scale per row, while transformers loads the model.

    `targets` has the meaning it has in `reparam.attach`.
    """

    def __init__(self, *, targets: targets_.Targets = ("all-linear",)) -> None:
        super().__init__(Int8(), targets)


def config_for(storage: Storage, targets: targets_.Targets) -> StorageConfig:
    """The quantization config for a storage. Raises ValueError for dense, which does not quantize."""
    if storage.name == "dense":
        quantized = ", ".join(name for name in sorted(STORAGES) if name != "dense")
        raise ValueError(
            f"the storage dense does not quantize, so it has no quantization config; choose one of {quantized}"
        )
    if isinstance(storage, NF4):
        return NF4Config(storage.block, double=storage.double, targets=targets)
    return Int8Config(targets=targets) if isinstance(storage, Int8) else StorageConfig(storage, targets)


def config_of(model: nn.Module) -> StorageConfig:
    """The quantization config of a quantized model. Raises ValueError unless all its matrices have the same storage."""
    held = storages_in(model)
    names = sorted({storage.name for storage in held.values()})
    if len(names) != 1:
        raise ValueError(
            f"the model's quantized matrices use {' and '.join(names) or 'no storage'}; a saved model can have only one"
        )
    storage = next(iter(held.values()))
    return config_for(storage, usual_targets(model))


def check_without_adapters(model: nn.Module) -> None:
    """Raise ValueError if adapters are on the model."""
    if any(isinstance(m, Replaced) or (isinstance(m, Adapted) and m.updates) for _, m in walk(model)):
        raise ValueError(
            "the model has adapters on it, and this writes a model without adapters: save the adapter "
            "(adapter.save), or call reparam.merge(model) first"
        )


# ---- bitsandbytes


def from_bitsandbytes(values: Mapping[str, Any]) -> StorageConfig:
    """Convert the entry that bitsandbytes wrote. Raises ValueError for LLM.int8 and FP4.

    The result has no targets: the tensors in the files show which matrices are quantized.
    """
    kind = values.get("bnb_4bit_quant_type")
    if values.get("load_in_8bit") or values.get("_load_in_8bit"):
        raise ValueError("is quantized with LLM.int8 of bitsandbytes, which cannot be read; load the original model")
    if kind != "nf4":
        raise ValueError(
            f"is quantized with {str(kind).upper()} of bitsandbytes; only NF4 can be read: load the original model"
        )
    return NF4Config(double=bool(values.get("bnb_4bit_use_double_quant")), targets=())


def to_bitsandbytes(model: Any) -> dict[str, Any]:
    """The entry with which transformers and bitsandbytes load the model, without its adapters.

    Raises ValueError for a storage other than NF4, for quantized embeddings, and for quantized matrices that the list
    of modules to skip (`llm_int8_skip_modules`) would match, too.
    """
    config = config_of(model)
    if config.storage.name != "nf4":
        raise ValueError(f"bitsandbytes cannot read reparam's {config.storage.name}; quantize the model to nf4")
    held = storages_in(model)
    modules = dict(walk(model))
    problems = [f"{path} is an embedding" for path in held if targets_.sizes(modules[path])[0] == "embedding"]
    skipped = [path for path, module in modules.items() if type(module) is nn.Linear or isinstance(module, Conv1D)]
    unread = [*skipped, *(model._keep_in_fp32_modules or ())]
    problems += [f"{path} would be read as a dense matrix" for path in held if not should_convert_module(path, unread)]
    if problems:
        raise ValueError(f"bitsandbytes could not read the model: {listed(problems)}; save it in the format 'reparam'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.storage.settings()["double"],
        bnb_4bit_compute_dtype=model.dtype,
        llm_int8_skip_modules=skipped,
    ).to_dict()
