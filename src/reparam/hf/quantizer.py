"""The quantizer that transformers calls: it quantizes models while they load, and reads and writes quantized models.

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=reparam.NF4Config())
    model.hf_quantizer.report

Each matrix is quantized as soon as it is read, and freed before the next one is read. The resulting modules are those
of `reparam.quantize`. Importing this file registers the method "reparam" with transformers; accessing
`reparam.NF4Config` or importing `reparam.hf.models` imports it. Unless it is registered, transformers cannot read a
quantized model: it warns of an "unknown quantization type" and then of wrong shapes.
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
from reparam.core.checks import listed
from reparam.core.text import counted
from reparam.errors import FormatError
from reparam.hf.config import METHOD, Int8Config, NF4Config, StorageConfig, config_of
from reparam.hf.digest import KEY, digest_of, digest_of_all, digests_of, told_digests
from reparam.io.mapped import Mapped
from reparam.sites import targets as targets_
from reparam.sites.expert import Expert
from reparam.sites.expert_paths import stacked
from reparam.sites.experts import Opened, make_room, open_experts, settle
from reparam.sites.module import is_conv1d
from reparam.sites.walk import storages_in
from reparam.weights.dense import as_matrix
from reparam.weights.layouts import keys_in_files, layout_of

__all__ = ["Int8Config", "NF4Config", "Quantizer"]
_log = logging.getLogger(__name__)


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """The quantizer of transformers for the method "reparam". After loading, `report` lists what was quantized."""

    quantization_config: StorageConfig

    def __init__(self, quantization_config: StorageConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.paths: frozenset[str] = frozenset()
        """Paths of the modules to quantize or, for quantized files, of those that `config.json` lists as quantized."""
        self.stacks: dict[str, tuple[str, ...]] = {}
        """The parameters in which experts to quantize are stacked, with the paths of the experts."""
        self.sites: dict[str, QuantizedSite] = {}
        self.problems: list[str] = []
        self.missing: set[str] = set()
        self.mapped = Mapped(())
        self.told: set[str] = set()
        """The digests that the files of a quantized model hold; usually one."""
        self.digests: dict[str, str] = {}
        """The digest of each quantized matrix that was read, by path."""
        self.report: QuantizeReport | None = None

    # Quantized weights are frozen, but the gradient passes through them to the input, so adapters can train.
    @property
    def is_trainable(self) -> bool:
        """Always true: adapters on the model can be trained."""
        return True

    # Trainer refuses a quantized model that is not a PeftModel unless this is true. Here it means that the model has
    # trainable parameters (the adapters), not that the quantized weights are trained.
    @property
    def is_qat_trainable(self) -> bool:
        """Always true, so that Trainer accepts the model."""
        return True

    def is_serializable(self) -> bool:
        """Always true: `save_pretrained` can write the model."""
        return True

    @property
    def quantized_element_size(self) -> float:
        """Bytes per quantized entry; transformers plans device maps with it."""
        weight = self.quantization_config.storage.quantize(torch.zeros(128, 128))  # a multiple of every block size
        return sum(parameter.nbytes for parameter in weight.parameters()) / 128**2

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError if the device map offloads modules to disk."""
        places = kwargs.get("device_map")
        if isinstance(places, dict) and "disk" in places.values():
            raise ValueError(
                "device_map: quantized matrices cannot be offloaded to disk; remove 'disk' from the device map, or, for"
                " a map that transformers makes, raise max_memory"
            )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this tensor is the weight of a module to quantize, or holds those of several experts."""
        return param_name.removesuffix(".weight") in self.paths or param_name in self.stacks

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that quantizes a tensor that was read."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """For quantized files: the converter that makes one weight from the tensors stored for it. Otherwise none."""
        if not self.pre_quantized:
            return []
        keys = keys_in_files(self.quantization_config.storage)
        return [WeightConverter(keys, "weight", [_Read(self)])]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None for the stored tensors of quantized weights, which keep their dtype; tells `_Read` the requested one."""
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, _Read):
                operation.dtype = dtype
                return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        wanted = self.quantization_config.targets
        self.paths = frozenset(targets_.resolve(model, wanted)) if wanted or not self.pre_quantized else frozenset()
        self.stacks = stacked(model, self.paths)
        if self.pre_quantized:
            make_room(model, self.stacks)
        if not self.pre_quantized:
            tied = {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}
            shared = sorted(path for path in self.paths if f"{path}.weight" in tied)
            if shared:
                raise ValueError(f"targets: {listed(shared)}: shares its weight with another module; leave it out")
            self.mapped = Mapped(checkpoint_files or ())
        else:
            self.told = told_digests(checkpoint_files or ())
        return model

    def put(self, model: Any, path: str, weight: Weight, before: int) -> None:
        """Replace the module at `path` by one with the quantized weight. `before`: bytes that were read for it."""
        module = targets_.wrap(model.get_submodule(path))
        module.hold(weight)
        module._is_hf_initialized = True  # type: ignore[assignment]  # otherwise transformers may initialize it
        model.set_submodule(path, module)
        held = sum(parameter.nbytes for parameter in weight.parameters())
        self.sites[path] = QuantizedSite(path, weight.out_features * weight.in_features, held, before)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        rest = sorted(self.paths - self.sites.keys())
        if self.pre_quantized and not self.problems:
            self.problems = [f"{path}.weight is not quantized, but config.json lists it as quantized" for path in rest]
            self.problems += (
                [] if self.sites else ["no matrix is quantized, but config.json describes a quantized model"]
            )
        # Without targets, config.json does not give the storage's settings, so there is nothing to compare.
        if self.pre_quantized and self.quantization_config.targets:
            told = self.quantization_config.storage
            found = {path: model.get_submodule(path).frozen.storage for path in self.sites}
            wrong = [path for path, storage in found.items() if storage != told]
            if wrong:
                count = f"{counted(len(wrong), 'matrix', 'matrices')} (first: {wrong[0]})"
                self.problems.append(f"{count} are quantized as {found[wrong[0]]}, but config.json says {told}")
        if not self.problems and self.told and self.told != {digest_of_all(self.digests)}:
            self.problems.append(
                "the quantized tensors differ from those that were saved, so the files are damaged; get them again, or "
                "quantize the original model again"
            )
        if self.problems:
            raise FormatError(listed(self.problems))
        for module in list(model.modules()):
            settle(module)
        for path in rest:  # those that transformers' own conversions renamed
            matrix = model.get_submodule(path).weight.detach()
            self.quantize(model, path, matrix)
        for path in self.sites:
            module = model.get_submodule(path)
            if module.bias is not None and module.origin:
                if f"{path}.bias" in self.missing:  # transformers reports it as missing and does not initialize it
                    nn.init.zeros_(module.bias)
                module.origin[0].bias = module.bias  # the original module, which `restore` puts back
        if self.pre_quantized and not self.quantization_config.targets:
            self.quantization_config = model.config.quantization_config = config_of(model)
        quantized = {id(p) for path in self.sites for p in model.get_submodule(path).frozen.parameters()}
        left = {name: p.nbytes for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in quantized}
        self.report = QuantizeReport(self.quantization_config.storage, tuple(self.sites.values()), left)
        _log.info("%s", self.report)
        return model

    def quantize(self, model: Any, path: str, matrix: Tensor) -> None:
        """Quantize the matrix that the files hold for the module at `path`.

        Raises ValueError, with the path, for another shape and for what the storage cannot quantize, such as NaN.
        """
        module = model.get_submodule(path)
        if matrix.shape != module.weight.shape:
            sizes = f"{list(matrix.shape)} in the files, but {list(module.weight.shape)} in the model"
            raise ValueError(f"{path}.weight is {sizes}")
        try:
            weight = self.quantization_config.storage.quantize(matrix.t() if is_conv1d(module) else matrix)
        except ValueError as error:
            raise ValueError(f"{path}.weight: {error}") from error
        self.put(model, path, weight, matrix.nbytes)

    def quantize_experts(self, model: Any, key: str, stack: Tensor) -> None:
        """Quantize the experts in a stack that was read [E, O, I] or [E, I, O]. Raises ValueError as `quantize`."""
        module = model.get_submodule(key.rpartition(".")[0])
        own = module.get_parameter(key.rpartition(".")[2])
        if stack.shape != own.shape:
            raise ValueError(f"{key} is {list(stack.shape)} in the files, but {list(own.shape)} in the model")
        if not isinstance(module, Opened):
            open_experts(module)
        for path in self.stacks[key]:
            expert: Expert = model.get_submodule(path)
            matrix = stack[int(path.split(".")[-2])]
            try:
                own = self.quantization_config.storage.quantize(as_matrix(matrix, expert.layout).contiguous())
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            self.put(model, path, own, matrix.nbytes)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors that `save_pretrained` writes. Updates the quantization config to what is quantized now."""
        if storages_in(model):
            self.quantization_config = model.config.quantization_config = config_of(model)
        else:  # everything was dequantized after loading
            self.remove_quantization_config(model)
        state = model.state_dict()
        digests = digests_of(state, storages_in(model))
        return state, {KEY: digest_of_all(digests)} if digests else {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        held = storages_in(model)
        if held:
            quantize(model, "dense", targets=list(held))
        return model.to(dtype)


class _Quantize(ConversionOps):
    """Quantizes each matrix as soon as it is read."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Put the quantized weight into the model; return only the tensors that transformers should set."""
        model, missing, quantizer = kwargs["model"], kwargs["missing_keys"], self.quantizer
        quantizer.missing = missing
        for key in [key for key in input_dict if quantizer.param_needs_quantization(model, key)]:
            found = input_dict.pop(key)
            missing.discard(key)  # otherwise transformers warns and initializes it
            found = found[0] if isinstance(found, list) else found
            try:
                if key in quantizer.stacks:
                    quantizer.quantize_experts(model, key, found)
                else:
                    quantizer.quantize(model, key.removesuffix(".weight"), found)
            except ValueError as error:  # all problems are raised together after loading
                quantizer.problems.append(str(error))
            del found
        quantizer.mapped.forget()  # otherwise the pages of the file that were read count as memory of the process
        return input_dict


class _Read(ConversionOps):
    """Makes one quantized weight from the tensors stored for it; passes dense weights on."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: Any) -> Self:
        return type(self)(self.quantizer)  # transformers copies this for each weight; all copies share the quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Put the quantized weight into the model; return only the tensors that transformers should set."""
        model, name, quantizer = kwargs["model"], kwargs["full_layer_name"], self.quantizer
        parts = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        alone = parts.get("weight") if len(parts) == 1 else None
        if alone is not None and alone.dtype not in (torch.uint8, torch.int8):  # a dense matrix
            return {"weight": alone.to(self.dtype)}
        quantizer.missing = kwargs["missing_keys"]
        quantizer.missing.discard(name)
        try:
            self._put(model, name.removesuffix(".weight").removesuffix(f".{Expert.packed_at[:-1]}"), parts)
        except ValueError as error:
            quantizer.problems.append(str(error))
        return {}

    def _put(self, model: Any, path: str, parts: Mapping[str, Tensor]) -> None:
        module = model.get_submodule(path)
        why = targets_.unsupported_reason(module)
        if why:
            raise FormatError(f"{path}: is quantized in the files, but {why}")
        if self.quantizer.told:
            self.quantizer.digests[path] = digest_of(parts)
        layout = layout_of(self.quantizer.quantization_config.storage)
        _, *sizes = targets_.sizes(module)
        state = {f"{path}.{key}": tensor for key, tensor in parts.items()}
        weight = layout.weight_from(state, path, (sizes[0], sizes[1])).to(self.dtype)
        if [weight.out_features, weight.in_features] != sizes:
            raise FormatError(
                f"{path}.weight is {[weight.out_features, weight.in_features]} in the files, but {sizes} in the model"
            )
        self.quantizer.put(model, path, weight, sum(tensor.nbytes for tensor in parts.values()))

    @property
    def reverse_op(self) -> ConversionOps:
        """The operation on saving: none, because the state dict has the tensors of the files already."""
        return _Keep()


class _Keep(ConversionOps):
    """Returns its input unchanged."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the input."""
        return input_dict
