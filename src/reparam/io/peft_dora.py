"""DoRA in PEFT's files: LoRA's tensors, and `.lora_magnitude_vector` [O] at each site.

For an embedding, PEFT stores one magnitude per column, which is not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from reparam.core.base import Site
from reparam.core.checks import listed
from reparam.errors import FormatError
from reparam.io.peft_config import parse
from reparam.io.peft_factors import sites_of, sort, tensors_of
from reparam.io.peft_formats import PREFIX, Folder, PeftFormat, peft_format
from reparam.io.peft_lora import check_ranks, method_of, settings_of
from reparam.io.record import Record
from reparam.methods.dora import DoRA

MAGNITUDE = ".lora_magnitude_vector"


@peft_format(DoRA)
class DoRAFormat(PeftFormat[DoRA]):
    """PEFT's file format of DoRA."""

    peft_type = "LORA"

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Whether the settings describe a LoRA with `use_dora`."""
        return super().reads(settings) and bool(settings.get("use_dora"))

    def read(self, folder: Folder) -> Record:
        """Read the factors, the magnitudes and the method's settings."""
        config = parse(folder.settings, folder.config)
        found = sort(folder.tensors(), config, {MAGNITUDE: "magnitude"})
        for name, kind in found.kinds.items():
            if kind == "embedding":
                found.problems.append(
                    f"{name}: PEFT's DoRA on an embedding has one magnitude per column, which is not supported"
                )
            elif f"{name}.magnitude" not in found.tensors:
                found.problems.append(f"missing {PREFIX}{name}{MAGNITUDE}")
        found.check(folder.weights)
        sites = sites_of(found, folder.weights)
        method = method_of(DoRA, config, sites, folder.config)
        check_ranks(method, found.tensors, sites, folder.config)
        moved = {f"{name}.{part}": f"{name}.low_rank.{part}" for name in sites for part in ("A", "B")}
        tensors = {moved.get(key, key): tensor for key, tensor in found.tensors.items()}
        return found.record(method, sites, tensors, config)

    def check(self, method: DoRA, record: Record) -> None:
        """Raise FormatError if PEFT's DoRA cannot express the adapter."""
        super().check(method, record)
        problems = ["magnitudes of columns (norm_axis='input')"] * (method.norm_axis != "output")
        problems += ["magnitudes only (magnitude_only)"] * method.magnitude_only
        problems += [
            f"one magnitude per row of the embedding {n}" for n, s in record.sites.items() if s.kind != "linear"
        ]
        if problems:
            raise FormatError(f"PEFT has no equivalent of DoRA with {listed(problems)}; save with format='reparam'")

    def settings(self, method: DoRA, record: Record) -> dict[str, Any]:
        """LoRA's settings with `use_dora` set."""
        return settings_of(method, record) | {"use_dora": True}

    def tensors(self, name: str, site: Site, record: Record) -> dict[str, Tensor]:
        """The factors and the magnitudes of one site, by the ends of their keys."""
        return tensors_of(name, site, record, inside="low_rank.") | {MAGNITUDE: record.tensors[f"{name}.magnitude"]}
