"""The quantizer that transformers calls: quantizing while a model is read, files of quantized models, training under
Trainer.

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=reparam.NF4Config())
    model.hf_quantizer.report

Each matrix is quantized as soon as it is read, and let go before the next one is. What is put in its place is the
module that `reparam.quantize` puts there. Importing this file registers the method "reparam" with transformers;
touching `reparam.NF4Config` or importing `reparam.hf.models` does that. Before it, transformers cannot read the folder
of a quantized model: it warns of an "unknown quantization type" and then about the sizes of all matrices.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantizer

from reparam.adapter.quantize import QuantizedSite, QuantizeReport, quantize
from reparam.core.base import Weight
from reparam.errors import FormatError
from reparam.hf.config import METHOD, Int8Config, NF4Config, StorageConfig, config_of, file_tensors
from reparam.io.layouts import keys_in_files, layout_of
from reparam.io.mapped import Mapped
from reparam.io.record import listed
from reparam.sites import targets as targets_
from reparam.sites.module import is_conv1d
from reparam.sites.walk import storages_in

__all__ = ["Int8Config", "NF4Config", "Quantizer"]
_log = logging.getLogger(__name__)


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """What transformers calls while it loads and saves. `report` says what was quantized and what was left."""

    quantization_config: StorageConfig

    def __init__(self, quantization_config: StorageConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.paths: frozenset[str] = frozenset()
        """Modules that are to be quantized, or that `config.json` says are quantized in the files."""
        self.sites: dict[str, QuantizedSite] = {}
        self.problems: list[str] = []
        self.missing: set[str] = set()
        self.mapped = Mapped(())
        self.report: QuantizeReport | None = None

    # Quantized weights are frozen and x goes through them differentiably: adapters on top of them train.
    @property
    def is_trainable(self) -> bool:
        """Always true."""
        return True

    # Trainer refuses a quantized model that is no PEFT model unless this is true: it stands for "has parameters that
    # train without PEFT", which our adapters are, and not for training the quantized weights.
    @property
    def is_qat_trainable(self) -> bool:
        """Always true."""
        return True

    def is_serializable(self) -> bool:
        """Always true."""
        return True

    @property
    def quantized_element_size(self) -> float:
        """Bytes for each quantized entry, from which transformers plans a device map."""
        weight = self.quantization_config.storage.quantize(torch.zeros(128, 128))  # whole blocks of any size
        return sum(parameter.nbytes for parameter in weight.parameters()) / 128**2

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a device map that leaves quantized matrices on the disk."""
        places = kwargs.get("device_map")
        if isinstance(places, dict) and "disk" in places.values():
            raise ValueError("device_map: quantized matrices cannot stay on the disk; leave 'disk' out of it")

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this tensor is the matrix of a module that is to be quantized."""
        return param_name.endswith(".weight") and param_name.removesuffix(".weight") in self.paths

    def get_quantize_ops(self) -> ConversionOps:
        """What quantizes one tensor."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """For quantized files: what gathers the tensors of each weight and makes one of them."""
        if not self.pre_quantized:
            return []
        keys = keys_in_files(self.quantization_config.storage)
        return [WeightConverter(keys, "weight", [_Read(self)])]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None for the tensors of quantized weights, which keep theirs; `_Read` is told what was asked for."""
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, _Read):
                operation.dtype = dtype
                return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        wanted = self.quantization_config.targets
        self.paths = frozenset(targets_.resolve(model, wanted)) if wanted else frozenset()
        if not self.pre_quantized:
            tied = {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}
            shared = sorted(path for path in self.paths if f"{path}.weight" in tied)
            if shared:
                raise ValueError(f"targets: {listed(shared)}: shares its weight with another module; leave it out")
            self.mapped = Mapped(checkpoint_files or ())
        return model

    def put(self, model: Any, path: str, weight: Weight, before: int) -> None:
        """Put the quantized weight in the place of the module at `path`; `before`: bytes of its origin."""
        module = targets_.wrap(model.get_submodule(path))
        module.hold(weight)
        module._is_hf_initialized = True  # type: ignore[assignment]  # else transformers may draw numbers for it
        model.set_submodule(path, module)
        held = sum(parameter.nbytes for parameter in weight.parameters())
        self.sites[path] = QuantizedSite(path, weight.out_features * weight.in_features, held, before)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        rest = sorted(self.paths - self.sites.keys())
        if self.pre_quantized and not self.problems:
            self.problems = [f"{path}.weight is not quantized, and config.json says that it is" for path in rest]
            self.problems += [] if self.sites else ["no matrix is quantized, and config.json says that some are"]
        # Without targets, config.json says no more than "quantized", and there is nothing to compare with.
        if self.pre_quantized and self.quantization_config.targets:
            told = self.quantization_config.storage
            found = {path: model.get_submodule(path).frozen.storage for path in self.sites}
            wrong = [path for path, storage in found.items() if storage != told]
            if wrong:
                count = f"{len(wrong)} matrices (first: {wrong[0]})"
                self.problems.append(f"{count} are quantized as {found[wrong[0]]}, and config.json says {told}")
        if self.problems:
            raise FormatError(listed(self.problems))
        for path in rest:  # what came through transformers' own conversions under another first name
            matrix = model.get_submodule(path).weight.detach()
            self.quantize(model, path, matrix)
        for path in self.sites:
            module = model.get_submodule(path)
            if module.bias is not None:
                if f"{path}.bias" in self.missing:  # it has been named by transformers, and not been given values
                    nn.init.zeros_(module.bias)
                module.origin[0].bias = module.bias  # the stock module, which `restore` puts back
        if self.pre_quantized and not self.quantization_config.targets:
            self.quantization_config = model.config.quantization_config = config_of(model)
        quantized = {id(p) for path in self.sites for p in model.get_submodule(path).frozen.parameters()}
        left = {name: p.nbytes for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in quantized}
        self.report = QuantizeReport(self.quantization_config.storage, tuple(self.sites.values()), left)
        _log.info("%s", self.report)
        return model

    def quantize(self, model: Any, path: str, matrix: Tensor) -> None:
        """Quantize the matrix that the files hold for the module at `path`. Raises ValueError, naming it."""
        module = model.get_submodule(path)
        if matrix.shape != module.weight.shape:
            sizes = f"{list(matrix.shape)}, and the model's is {list(module.weight.shape)}"
            raise ValueError(f"{path}.weight is {sizes}")
        try:
            weight = self.quantization_config.storage.quantize(matrix.t() if is_conv1d(module) else matrix)
        except ValueError as error:
            raise ValueError(f"{path}.weight: {error}") from error
        self.put(model, path, weight, matrix.nbytes)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes; the configuration is made to say what is quantized now."""
        tensors = file_tensors(model)
        if storages_in(model):
            self.quantization_config = model.config.quantization_config = config_of(model)
        else:  # everything was dequantized since
            self.remove_quantization_config(model)
        return tensors, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        held = storages_in(model)
        if held:
            quantize(model, "dense", targets=list(held))
        return model.to(dtype)


class _Quantize(ConversionOps):
    """Quantizes a tensor that was just read."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Put the quantized weight into the model, and give transformers nothing to put there."""
        model, missing, quantizer = kwargs["model"], kwargs["missing_keys"], self.quantizer
        quantizer.missing = missing
        for key in [key for key in input_dict if quantizer.param_needs_quantization(model, key)]:
            found = input_dict.pop(key)
            missing.discard(key)  # else transformers warns of it and initializes it
            try:
                quantizer.quantize(model, key.removesuffix(".weight"), found[0] if isinstance(found, list) else found)
            except ValueError as error:  # all of them are raised at once, after loading
                quantizer.problems.append(str(error))
            del found
        quantizer.mapped.forget()  # else the process grows by the pages of the file that were read
        return input_dict


class _Read(ConversionOps):
    """Makes one weight of the tensors that a quantized file holds for it; passes on what is not quantized."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: Any) -> Self:
        return type(self)(self.quantizer)  # transformers copies one for each weight; the quantizer is one

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Put the quantized weight into the model, and give transformers nothing to put there."""
        model, name, quantizer = kwargs["model"], kwargs["full_layer_name"], self.quantizer
        parts = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        alone = parts.get("weight") if len(parts) == 1 else None
        if alone is not None and alone.dtype not in (torch.uint8, torch.int8):  # a matrix that was left as it is
            return {"weight": alone.to(self.dtype)}
        quantizer.missing = kwargs["missing_keys"]
        quantizer.missing.discard(name)
        try:
            self._put(model, name.removesuffix(".weight"), parts)
        except ValueError as error:
            quantizer.problems.append(str(error))
        return {}

    def _put(self, model: Any, path: str, parts: Mapping[str, Tensor]) -> None:
        module = model.get_submodule(path)
        why = targets_.unsupported_reason(module)
        if why:
            raise FormatError(f"{path}: is quantized in the files, and {why}")
        layout = layout_of(self.quantizer.quantization_config.storage)
        _, *sizes = targets_.sizes(module)
        state = {f"{path}.{key}": tensor for key, tensor in parts.items()}
        weight = layout.weight_from(state, path, (sizes[0], sizes[1])).to(self.dtype)
        if [weight.out_features, weight.in_features] != sizes:
            raise FormatError(
                f"{path}.weight is {[weight.out_features, weight.in_features]}, and the model's is {sizes}"
            )
        self.quantizer.put(model, path, weight, sum(tensor.nbytes for tensor in parts.values()))

    @property
    def reverse_op(self) -> ConversionOps:
        """What saving does: nothing, because `file_tensors` has done it."""
        return _Keep()


class _Keep(ConversionOps):
    """Passes on what it gets."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The input."""
        return input_dict
