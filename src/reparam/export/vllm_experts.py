"""The names and factors under which vLLM takes changes of experts: a plain LoRA for each matrix of each expert.

`gate_up_proj` is one matrix here and two in vLLM: both take its A, and each its rows of B. vLLM has other names for the
three matrices in models of Mixtral's kind.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from reparam.core.base import Factors, Site
from reparam.errors import ExportError
from reparam.sites.expert_paths import experts_with

NAMES = ("gate_proj", "up_proj", "down_proj")
OTHERS = {"mixtral": ("w1", "w3", "w2"), "minimax": ("w1", "w3", "w2"), "phimoe": ("w1", "w3", "w2")}
"""Names by the `model_type` of the base."""


def check(model: nn.Module, sites: list[Site]) -> None:
    """Raise ExportError for experts that vLLM does not take one by one."""
    for site in sites:
        holder, name = experts_with(model, site.name), site.name.rpartition(".")[2]
        plain = holder is not None and getattr(holder, "has_gate", False) and getattr(holder, "is_concatenated", False)
        if not plain or getattr(holder, "has_bias", False) or name not in ("gate_up_proj", "down_proj"):
            raise ExportError(
                f"vLLM takes single experts only of a gate and an up matrix, one after the other, and {site.name} is "
                f"none of these; pass --merged to write a merged model instead"
            )


def apart(model_type: str, site: Site, factors: Factors) -> dict[Site, Factors]:
    """The sites and factors in vLLM of the change of one matrix of an expert."""
    above, _, name = site.name.rpartition(".")
    gate, up, down = OTHERS.get(model_type, NAMES)
    if name == "down_proj":
        return {dataclasses.replace(site, name=f"{above}.{down}", kind="linear", transposed=False): factors}
    half = site.out_features // 2
    plain = dataclasses.replace(site, kind="linear", out_features=half, transposed=False)
    return {
        dataclasses.replace(plain, name=f"{above}.{gate}"): Factors(factors.A, factors.B[:half]),
        dataclasses.replace(plain, name=f"{above}.{up}"): Factors(factors.A, factors.B[half:]),
    }
