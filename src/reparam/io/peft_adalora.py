"""AdaLoRA in PEFT's files.

The keys are `.lora_A` [R, I], `.lora_B` [O, R] and `.lora_E` [R, 1], without `.weight`. R is the final rank of the site
and may be 0. `rank_pattern` states for each of a site's `init_r` components whether it was kept. The scale is
lora_alpha / (init_r + 1e-5), as in PEFT. Everything else is the same as for LoRA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reparam.core.base import Site
from reparam.core.checks import listed
from reparam.core.plain import decode
from reparam.errors import FormatError
from reparam.io import peft_lora
from reparam.io.peft_config import parse
from reparam.io.peft_factors import sites_of, sort
from reparam.io.peft_formats import PREFIX, Folder, PeftFormat, peft_format
from reparam.io.record import Record
from reparam.methods import patterns
from reparam.methods.adalora.method import AdaLoRA
from reparam.methods.lora import LoRA

ENDS = {".lora_A": ".lora_A.weight", ".lora_B": ".lora_B.weight"}
VALUES = ".lora_E"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The configuration keys that AdaLoRA adds to LoRA's, with PEFT's defaults."""

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815  (PEFT's spelling)
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None


@peft_format(AdaLoRA)
class AdaLoRAFormat(PeftFormat[AdaLoRA]):
    """PEFT's file format of AdaLoRA."""

    peft_type = "ADALORA"

    def read(self, folder: Folder) -> Record:
        """Read the factors, λ and the method's settings."""
        own, rest = _as_lora(folder.settings, folder.config)
        config = parse(rest, folder.config)
        raw, lambdas = _split(folder.tensors())
        found = sort(raw, config, {})
        found.check(folder.weights)
        sites = sites_of(found, folder.weights, least=0)
        lora = peft_lora.method_of(LoRA, config, sites, folder.config)
        ranks = {name: len(found.tensors[f"{name}.A"]) for name in sites}
        _check_read(own, lambdas, ranks, folder.weights)
        tensors = found.tensors | {f"{name}.E": value[:, 0] for name, value in lambdas.items()}
        return found.record(_method_of(own, lora, ranks, folder.config), sites, tensors, config)

    def check(self, method: AdaLoRA, record: Record) -> None:
        """Raise FormatError if PEFT's AdaLoRA cannot express the adapter."""
        super().check(method, record)
        problems = ["DoRA's magnitudes (magnitude)"] * method.magnitude
        problems += [f"the embedding {name}" for name, site in record.sites.items() if site.kind != "linear"]
        problems += [
            f"rank {method.rank(name)} at {name}, above init_r"
            for name in record.sites
            if method.rank(name) > method.init_r
        ]
        if problems:
            raise FormatError(f"PEFT has no equivalent of AdaLoRA with {listed(problems)}; save with format='reparam'")

    def settings(self, method: AdaLoRA, record: Record) -> dict[str, Any]:
        """LoRA's settings and AdaLoRA's. Without `total_steps` in the method, the file gets a one-step schedule."""
        lora = LoRA(r=method.init_r, alpha=method.alpha, dropout=method.dropout)
        plan = method.plan(method.total_steps) if method.total_steps is not None else None
        return peft_lora.settings_of(lora, record) | {
            "peft_type": "ADALORA",
            "r": 8,  # PEFT ignores this key, and warns of any other value
            "target_r": round(method.target_r),
            "init_r": method.init_r,
            "tinit": plan.tinit if plan else 0,
            "tfinal": plan.tfinal if plan else 0,
            "deltaT": method.delta_t,
            "beta1": method.beta1,
            "beta2": method.beta2,
            "orth_reg_weight": method.orth_weight,
            "total_step": plan.total if plan else 1,
            "rank_pattern": {
                f"{name}{VALUES}": [True] * (r := method.rank(name)) + [False] * (method.init_r - r)
                for name in record.sites
            },
        }

    def tensors(self, name: str, site: Site, record: Record) -> dict[str, Tensor]:
        """The factors and λ of one site, by the ends of their keys."""
        a, b, e = (record.tensors[f"{name}.{part}"] for part in "ABE")
        return {".lora_A": a, ".lora_B": b, VALUES: e[:, None]}


def _as_lora(config: Mapping[str, Any], file: Path) -> tuple[Settings, dict[str, Any]]:
    """Split a configuration into AdaLoRA's own settings and the settings of a LoRA. Raises FormatError for use_dora."""
    names = {field.name for field in dataclasses.fields(Settings)}
    settings = decode(Settings, {key: value for key, value in config.items() if key in names}, file)
    if config.get("use_dora"):
        raise FormatError(f"{file}: use_dora: PEFT's AdaLoRA has no magnitudes")
    rest = {key: value for key, value in config.items() if key not in names and key != "use_rslora"}
    return settings, {**rest, "peft_type": "LORA", "r": settings.init_r}


def _split(raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the tensors into factors, renamed to LoRA's keys, and λ [R, 1] by site."""
    rest, values = {}, {}
    for key, tensor in raw.items():
        if key.endswith(VALUES) and key.startswith(PREFIX):
            values[key.removeprefix(PREFIX).removesuffix(VALUES)] = tensor
        else:
            end = next((end for end in ENDS if key.endswith(end)), "")
            rest[key.removesuffix(end) + ENDS.get(end, "")] = tensor
    return rest, values


def _check_read(settings: Settings, values: Mapping[str, Tensor], ranks: Mapping[str, int], file: Path) -> None:
    """Raise FormatError unless λ, the factors and `rank_pattern` of each site have the same rank."""
    kept = {name.removesuffix(VALUES): has for name, has in (settings.rank_pattern or {}).items()}
    problems = [f"missing {name}{VALUES}" for name in ranks if name not in values]
    problems += [f"{name}{VALUES} without factors" for name in values if name not in ranks]
    for name in values.keys() & ranks.keys():
        if values[name].shape != (ranks[name], 1):
            problems.append(f"{name}{VALUES} has shape {list(values[name].shape)}, expected {[ranks[name], 1]}")
        pattern = kept.get(name, [True] * settings.init_r)
        if len(pattern) != settings.init_r or sum(pattern) != ranks[name]:
            problems.append(
                f"{name}: rank {ranks[name]} in the weights, but rank_pattern keeps {sum(pattern)} of {len(pattern)} "
                f"components and init_r is {settings.init_r}"
            )
    if problems:
        raise FormatError(f"{file}: {listed(problems)}")


def _method_of(settings: Settings, lora: LoRA, ranks: Mapping[str, int], file: Path) -> AdaLoRA:
    """Build the method. Raises FormatError for invalid settings."""
    changed = any(rank != settings.init_r for rank in ranks.values())
    try:
        return AdaLoRA(
            init_r=settings.init_r,
            target_r=settings.target_r,
            alpha=lora.alpha,
            dropout=lora.dropout,
            total_steps=settings.total_step,
            tinit=settings.tinit,
            tfinal=settings.tfinal,
            delta_t=settings.deltaT,
            beta1=settings.beta1,
            beta2=settings.beta2,
            orth_weight=settings.orth_reg_weight,
            rank_pattern=patterns.exactly(ranks) if changed else {},
        )
    except ValueError as error:
        raise FormatError(f"{file}: {error}") from None
