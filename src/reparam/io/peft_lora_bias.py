"""LoRA with `lora_bias` in PEFT's files: LoRA's tensors, and `.lora_B.bias` [O] at each site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from reparam.core.base import Site
from reparam.errors import FormatError
from reparam.io.peft_config import parse
from reparam.io.peft_factors import sites_of, sort, tensors_of
from reparam.io.peft_formats import PREFIX, Folder, PeftFormat, peft_format
from reparam.io.peft_lora import check_ranks, method_of, settings_of
from reparam.io.record import Record
from reparam.methods.lora_bias import LoRABias

BIAS = ".lora_B.bias"


@peft_format(LoRABias)
class LoRABiasFormat(PeftFormat[LoRABias]):
    """PEFT's file format of LoRA with `lora_bias`."""

    peft_type = "LORA"

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Whether the settings describe a LoRA with `lora_bias`."""
        return super().reads(settings) and bool(settings.get("lora_bias"))

    def read(self, folder: Folder) -> Record:
        """Read the factors, the biases of B and the method's settings."""
        config = parse(folder.settings, folder.config)
        if config.use_dora:
            raise FormatError(f"{folder.config}: lora_bias with use_dora: PEFT has no such adapters")
        found = sort(folder.tensors(), config, {BIAS: "c"})
        for name, kind in found.kinds.items():
            if kind != "linear":
                found.problems.append(f"{name}: lora_bias on one of {kind}, which PEFT does not have")
            elif f"{name}.c" not in found.tensors:
                found.problems.append(f"missing {PREFIX}{name}{BIAS}")
        found.check(folder.weights)
        sites = sites_of(found, folder.weights)
        method = method_of(LoRABias, config, sites, folder.config)
        check_ranks(method, found.tensors, sites, folder.config)
        return found.record(method, sites, found.tensors, config)

    def settings(self, method: LoRABias, record: Record) -> dict[str, Any]:
        """LoRA's settings with `lora_bias` set."""
        return settings_of(method, record) | {"lora_bias": True}

    def tensors(self, name: str, site: Site, record: Record) -> dict[str, Tensor]:
        """The factors and the bias of B of one site, by the ends of their keys."""
        return tensors_of(name, site, record) | {BIAS: record.tensors[f"{name}.c"]}
