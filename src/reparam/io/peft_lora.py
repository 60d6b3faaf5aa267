"""LoRA in PEFT's files: two factors per site, and the scale in the settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from reparam.core.base import Site
from reparam.core.checks import listed
from reparam.errors import FormatError
from reparam.io.peft_config import Honored, parse
from reparam.io.peft_experts import unstacked
from reparam.io.peft_factors import replaced_of, sites_of, sort, targets_of, tensors_of
from reparam.io.peft_formats import Folder, PeftFormat, peft_format
from reparam.io.peft_weights import WEIGHTS
from reparam.io.record import Record, Tied
from reparam.methods import patterns
from reparam.methods.lora import LoRA

_L = TypeVar("_L", bound=LoRA)


@peft_format(LoRA)
class LoRAFormat(PeftFormat[LoRA]):
    """PEFT's file format of LoRA."""

    peft_type = "LORA"
    ties = True
    experts = True

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Whether the settings describe a LoRA without `use_dora`."""
        return super().reads(settings) and not settings.get("use_dora")

    def read(self, folder: Folder) -> Record:
        """Read the factors and the method's settings."""
        config = parse(folder.settings, folder.config)
        found = sort(folder.tensors(), config, {})
        found.check(folder.weights)
        tensors, kinds, config = unstacked(found.tensors, found.kinds, config, folder.weights)
        found = dataclasses.replace(found, tensors=tensors, kinds=kinds)
        sites = sites_of(found, folder.weights)
        method = method_of(LoRA, config, sites, folder.config)
        check_ranks(method, found.tensors, sites, folder.config)
        tied = _tied(method, sites, found.tensors) if config.ensure_weight_tying else {}
        if not tied:
            return found.record(method, sites, found.tensors, config)
        leaders = {name: site for name, site in sites.items() if name not in tied}
        gone = {f"{path}.{factor}" for path in tied for factor in ("A", "B")}
        tensors = {key: tensor for key, tensor in found.tensors.items() if key not in gone}
        method = method_of(LoRA, config, leaders, folder.config)
        return dataclasses.replace(found.record(method, leaders, tensors, config), tied=tied)

    def settings(self, method: LoRA, record: Record) -> dict[str, Any]:
        """The contents of `adapter_config.json`, as `settings_of` builds them."""
        return settings_of(method, record)

    def tensors(self, name: str, site: Site, record: Record) -> dict[str, Tensor]:
        """The factors of one site, by the ends of their keys."""
        return tensors_of(name, site, record)


def _tied(method: LoRA, sites: Mapping[str, Site], tensors: Mapping[str, Tensor]) -> dict[str, Tied]:
    """The linear maps that have the factors and the scale of an embedding: PEFT wrote one update twice.

    Where nothing is tied in the base, PEFT trains two updates in spite of `ensure_weight_tying`.
    """
    found: dict[str, Tied] = {}
    for leader in [name for name, site in sites.items() if site.kind == "embedding"]:
        for path in [name for name, site in sites.items() if site.kind == "linear" and name not in found]:
            pairs = [(tensors[f"{path}.{factor}"], tensors[f"{leader}.{factor}"]) for factor in ("A", "B")]
            if method.at(path) == method.at(leader) and all(torch.equal(one, other) for one, other in pairs):
                found[path] = Tied(leader, "linear")
    return found


def method_of(cls: type[_L], config: Honored, sites: Iterable[str], file: Path) -> _L:
    """Build the method from the settings. Raises FormatError for invalid settings."""

    def used(values: dict[str, Any] | None) -> dict[str, Any]:
        """Drop patterns that match no site: PEFT keeps them in the file, and our methods refuse them."""
        return {p: v for p, v in (values or {}).items() if any(patterns.matches(p, name) for name in sites)}

    try:
        return cls(
            r=config.r,
            alpha=config.lora_alpha,
            scaling="rslora" if config.use_rslora else "alpha_over_r",
            dropout=config.lora_dropout,
            rank_pattern=used(config.rank_pattern),
            alpha_pattern=used(config.alpha_pattern),
        )
    except ValueError as error:
        raise FormatError(f"{file}: {error}") from None


def check_ranks(method: LoRA, tensors: Mapping[str, Tensor], sites: Iterable[str], file: Path) -> None:
    """Raise FormatError if the factors of a site have another rank than the settings state."""
    ranks = {name: len(tensors[f"{name}.A"]) for name in sites}
    wrong = [
        f"{name}: rank {rank} in {WEIGHTS}, but {method.at(name)[0]} according to r and rank_pattern"
        for name, rank in ranks.items()
        if rank != method.at(name)[0]
    ]
    if wrong:
        raise FormatError(
            f"{file}: {listed(wrong)}; check rank_pattern: the first matching pattern counts, and PEFT sorts patterns"
        )


def settings_of(method: LoRA, record: Record) -> dict[str, Any]:
    """The configuration of a LoRA, with only the keys that are needed: other releases of PEFT may not know the rest."""
    at = {name: method.at(record.tied[name].to if name in record.tied else name) for name in record.sites}
    ranks = {name: rank for name, (rank, _) in at.items()}
    alphas = {name: alpha for name, (_, alpha) in at.items()}
    alpha = method.alpha
    if method.scaling in ("alpha", "none"):  # PEFT has only alpha / r (or √r): alpha = s · r gives the scale s
        alphas = {name: method.scale(r=r, alpha=alphas[name]) * r for name, r in ranks.items()}
        alpha = method.scale(r=method.r, alpha=method.alpha) * method.r
    architecture = record.base.architecture if record.base else ""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": record.base.source if record.base else None,
        "r": method.r,
        "lora_alpha": _number(alpha),
        "lora_dropout": method.dropout,
        "use_rslora": method.scaling == "rslora",
        "use_dora": False,
        "rank_pattern": {_exactly(name): r for name, r in ranks.items() if r != method.r},
        "alpha_pattern": {_exactly(name): _number(a) for name, a in alphas.items() if a != alpha},
        "target_modules": targets_of(record),
        "modules_to_save": replaced_of(record),
        "bias": "lora_only" if any(f"{name}.bias" in record.tensors for name in record.sites) else "none",
        "inference_mode": True,
    }
    if record.tied:
        config["ensure_weight_tying"] = True
    if any(site.transposed for site in record.sites.values()):
        config["fan_in_fan_out"] = True  # avoids a warning of PEFT
    return config


def _exactly(name: str) -> str:
    """A regular expression that matches this path and no other."""
    return "^" + re.escape(name)


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
