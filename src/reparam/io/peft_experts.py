"""Experts in PEFT's files: LoRA on the stacked parameters of a module of experts (`target_parameters`).

PEFT puts one wrapper around the module for each parameter, the first parameter inside. With two of them, the keys are
`<experts>.base_layer.lora_A.weight` for the first and `<experts>.lora_A.weight` for the last. The factors of all E
experts are in one tensor each: A [E·R, I], with the rank fastest, and B [O, R·E], with the expert fastest.

PEFT takes the first dimension of a parameter [E, O, I] for the outputs unless the module says that it is transposed. So
for Llama 4, whose parameters are [E, I, O] without saying so, its A is our Bᵀ and its B is our Aᵀ.

In most models whose experts transformers has fused, PEFT takes the targets `gate_proj`, `up_proj`, `down_proj`, `gate`,
`w1`, `w2` and `w3` for the experts, whole paths too, and drops the updates of ordinary linear maps with these names.
Those are written as targets of their parameter `weight`, which have the same keys.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import warnings
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reparam.core.base import Site
from reparam.core.checks import listed
from reparam.errors import FormatError
from reparam.io.peft_config import Honored
from reparam.io.record import Record
from reparam.methods import patterns
from reparam.methods.lora import LoRA

TAKEN = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Names of linear maps that PEFT takes for those of experts."""
RELEASE = "0.19.1"
"""The first release of PEFT that reads the layout that is written."""
LAST = ("down_proj", "w2")
"""The parameters that come after the others in a module of experts."""


def without_experts(record: Record) -> Record:
    """The record without the sites of experts, for the writer of ordinary sites."""
    inside = {name for name, site in record.sites.items() if site.kind == "expert"}
    return dataclasses.replace(
        record,
        sites={name: site for name, site in record.sites.items() if name not in inside},
        modules=tuple(path for path in record.modules if not _in_experts(path, record.experts)),
    )


def _in_experts(path: str, experts: Mapping[str, int]) -> bool:
    above = path.rpartition(".")[0]
    return above in experts or above.rpartition(".")[0] in experts


def parameters(record: Record) -> dict[str, dict[int, Site]]:
    """The sites of each stacked parameter, by its path, in the model's order, and by the number of the expert."""
    found: dict[str, dict[int, Site]] = {}
    for name, site in record.sites.items():
        if site.kind == "expert":
            holder, number, parameter = name.rsplit(".", 2)
            found.setdefault(f"{holder}.{parameter}", {})[int(number)] = site
    return found


def add(config: dict[str, Any], record: Record, method: Any) -> dict[str, Tensor]:
    """Add the settings for experts, and for linear maps that PEFT takes for experts, to the configuration.

    Returns the tensors of the experts, by key without the prefix of the file.
    """
    stacks = parameters(record)
    apart = [name for name, s in record.sites.items() if s.kind != "expert" and name.rpartition(".")[2] in TAKEN]
    apart = apart if record.experts and _is_converted(record.model_type) else []
    routers = [name for name, site in record.sites.items() if site.kind == "router" and name not in apart]
    weights = [f"{name}.weight" for name in (*apart, *routers)]
    if not stacks and not weights:
        return {}
    if config["lora_dropout"]:
        config["lora_dropout"] = 0.0
        warnings.warn(
            "PEFT has no dropout on parameters, so the file says lora_dropout = 0, which changes no output; the format "
            "'reparam' keeps the setting",
            stacklevel=5,
        )
    gone = {*apart, *routers}
    if isinstance(config["target_modules"], str) or gone:
        left = [name for name, site in record.sites.items() if site.kind != "expert" and name not in gone]
        config["target_modules"] = left or None
    config["peft_version"] = RELEASE
    config["target_parameters"] = [*_names(stacks, record), *weights]
    tensors: dict[str, Tensor] = {}
    holders: dict[str, list[str]] = {}
    for path in stacks:
        holders.setdefault(path.rpartition(".")[0], []).append(path)
    turned = record.base is not None and record.base.architecture.startswith("Llama4")
    for holder, paths in holders.items():
        for depth, path in enumerate(reversed(paths)):
            A, B, rank, alpha = _stacked(stacks[path], record, method, record.experts.get(holder, 0))
            for key, value, usual in (
                ("rank_pattern", rank, config["r"]),
                ("alpha_pattern", alpha, config["lora_alpha"]),
            ):
                if value != usual:
                    config[key]["^" + re.escape(path)] = value
            if turned:
                A, B = B.transpose(1, 2), A.transpose(1, 2)
            start = holder + depth * ".base_layer"
            tensors[f"{start}.lora_A.weight"] = A.reshape(-1, A.shape[2])
            tensors[f"{start}.lora_B.weight"] = B.permute(1, 2, 0).reshape(B.shape[1], -1)
    return tensors


def _is_converted(model_type: str) -> bool:
    """Whether PEFT converts the settings of this type of model, by transformers' own table."""
    try:
        table = importlib.import_module("transformers.conversion_mapping")._MODEL_TO_CONVERSION_PATTERN
    except (ImportError, AttributeError):
        return True
    return model_type == "mixtral" or table.get(model_type) in ("mixtral", "qwen2_moe")


def _names(stacks: Mapping[str, Any], record: Record) -> list[str]:
    """The shortest names that PEFT takes for exactly these parameters."""
    ends = sorted({".".join(path.split(".")[-2:]) for path in stacks})
    all_of_them = {f"{holder}.{end.rpartition('.')[2]}" for holder in record.experts for end in ends}
    return ends if all_of_them == set(stacks) else list(stacks)


def _stacked(sites: Mapping[int, Site], record: Record, method: LoRA, count: int) -> tuple[Tensor, Tensor, int, float]:
    """A [E, R, I], B [E, O, R], the rank and the alpha of a stack. Experts without an update get zeros."""
    ranks = {number: method.at(site.name) for number, site in sites.items()}
    rank = max(r for r, _ in ranks.values())
    scales = {number: method.scale(r=r, alpha=alpha) for number, (r, alpha) in ranks.items()}
    most = next(scales[number] for number, (r, _) in ranks.items() if r == rank)
    site = next(iter(sites.values()))
    size = max(count, max(sites) + 1)
    dtype = record.tensors[f"{site.name}.A"].dtype
    A = torch.zeros(size, rank, site.in_features, dtype=dtype)
    B = torch.zeros(size, site.out_features, rank, dtype=dtype)
    for number, own in sites.items():
        r = ranks[number][0]
        A[number, :r] = record.tensors[f"{own.name}.A"]
        scaled = record.tensors[f"{own.name}.B"]
        B[number, :, :r] = scaled if scales[number] == most else scaled * (scales[number] / most)
    alpha = most * (math.sqrt(rank) if method.scaling == "rslora" else rank)
    return A, B, rank, int(alpha) if float(alpha).is_integer() else alpha


# ---- reading


def unstacked(
    tensors: dict[str, Tensor], kinds: dict[str, str], config: Honored, file: Path
) -> tuple[dict[str, Tensor], dict[str, str], Honored]:
    """The factors of each expert, the kinds of their sites, and the configuration with patterns for these sites.

    Raises FormatError for shapes that do not fit the ranks.
    """
    wanted = [name for name in config.target_parameters or () if not name.endswith(".weight")]
    if not wanted:
        return tensors, kinds, config
    tensors, kinds = dict(tensors), dict(kinds)
    holders: dict[str, list[str]] = {}
    for path in list(kinds):
        holder = re.sub(r"(\.base_layer)+$", "", path)
        if path.endswith(".base_layer") or any(_matches(f"{holder}.{_leaf(name)}", name) for name in wanted):
            holders.setdefault(holder, []).append(path)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    problems: list[str] = []
    for holder, paths in holders.items():
        names = dict.fromkeys(_leaf(name) for name in wanted if _matches(f"{holder}.{_leaf(name)}", name))
        order = sorted(names, key=lambda name: (name in LAST, name))
        if len(order) != len(paths):
            problems.append(f"{holder}: factors for {len(paths)} parameters, but target_parameters name {len(order)}")
            continue
        for path in paths:
            name = order[len(order) - 1 - path.count(".base_layer")]
            kinds.pop(path)
            A, B = tensors.pop(f"{path}.A", None), tensors.pop(f"{path}.B", None)
            r = patterns.first(config.rank_pattern or {}, f"{holder}.{name}", config.r)
            if A is None or B is None or A.ndim != 2 or B.ndim != 2 or len(A) % r or len(A) != B.shape[1]:
                shapes = [None if t is None else list(t.shape) for t in (A, B)]
                problems.append(f"{path}: lora_A and lora_B are {shapes}, which is no stack of rank {r}")
                continue
            count = len(A) // r
            for number in range(count):
                site = f"{holder}.{number}.{name}"
                tensors[f"{site}.A"] = A[number * r : (number + 1) * r]
                tensors[f"{site}.B"] = B[:, number::count]
                kinds[site] = "expert"
            pattern = rf"{re.escape(holder)}\.\d+\.{re.escape(name)}"
            alpha = patterns.first(config.alpha_pattern or {}, f"{holder}.{name}", config.lora_alpha)
            ranks |= {pattern: r} if r != config.r else {}
            alphas |= {pattern: alpha} if alpha != config.lora_alpha else {}
    if problems:
        raise FormatError(f"{file}: {listed(problems)}")
    config = dataclasses.replace(
        config,
        rank_pattern={**ranks, **(config.rank_pattern or {})},
        alpha_pattern={**alphas, **(config.alpha_pattern or {})},
    )
    return tensors, kinds, config


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _matches(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def turned(record: Record, model_sites: Mapping[str, Site], undeclared: Container[str]) -> Record:
    """The record with A and B of experts exchanged where PEFT took the outputs of the model's parameter for inputs.

    The shapes tell it, or, for square matrices, the release of PEFT. `undeclared` are sites in modules that are
    transposed and do not say so. Raises FormatError if nothing tells it.
    """
    tensors, sites = dict(record.tensors), dict(record.sites)
    release = getattr(record.claims, "peft_version", None)
    for name, site in record.sites.items():
        own = model_sites.get(name)
        if own is None:
            continue
        if site.kind == "linear" and own.kind == "router":
            sites[name] = dataclasses.replace(site, kind="router")
        if site.kind != "expert" or own.kind != "expert":
            continue
        shapes = (site.out_features, site.in_features)
        swapped = shapes != (own.out_features, own.in_features) and shapes == (own.in_features, own.out_features)
        if own.out_features == own.in_features == site.in_features:
            swapped = _swapped(release, own, name in undeclared)
        if swapped:
            tensors[f"{name}.A"], tensors[f"{name}.B"] = (
                record.tensors[f"{name}.B"].t(),
                record.tensors[f"{name}.A"].t(),
            )
            sites[name] = dataclasses.replace(site, out_features=own.out_features, in_features=own.in_features)
    return dataclasses.replace(record, sites=sites, tensors=tensors)


def _swapped(release: str | None, own: Site, undeclared: bool) -> bool:
    """Whether this release of PEFT put A over the outputs of a square expert."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", release or "")
    if found is None:
        raise FormatError(
            f"{own.name} is square, and the file does not tell the release of PEFT (peft_version), which decides how "
            f"its factors are laid out; add the key, or save the adapter again with a present release of PEFT"
        )
    version = tuple(map(int, found.groups()))
    if version < (0, 19, 0):
        return not own.transposed
    if version < (0, 19, 1):
        return not undeclared
    return undeclared
