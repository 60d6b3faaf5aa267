"""Fit the record of an adapter to a model, for what a PEFT folder states that only the model can tell.

- Modules that transformers has renamed since the adapter was saved get their present names, by the rules with which
  transformers itself reads the files of such models.
- Tensors of modules that the settings do not name are left out, as PEFT does, with a warning.
- `bias="all"` saves the biases of all modules. Those without other tensors in the file become sites, whose bias alone
  trains.
- Modules of which single tokens train become sites of the method `tokens`.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reparam.adapter.same_base import same_values
from reparam.core.checks import listed
from reparam.errors import FormatError
from reparam.io.peft_experts import turned
from reparam.io.record import Claims, Record, Tied
from reparam.methods import patterns
from reparam.methods.several import NONE, Several
from reparam.sites import targets
from reparam.sites.expert_paths import experts_with
from reparam.sites.fingerprint import base_tensors
from reparam.sites.kinds import kind_of
from reparam.sites.walk import same_weight


def fitted(model: nn.Module, have: Mapping[str, nn.Module], record: Record, folder: Path) -> Record:
    """The record for this model, whose modules are `have`. Raises FormatError if it does not fit."""
    if record.claims is None:
        return record
    record = _with_present_names(model, have, record)
    own = {name: targets.site_of(name, have[name]) for name in record.sites if name in have and kind_of(have[name])}
    experts = {
        name: experts_with(model, name) for name, site in own.items() if site.kind == "expert" and site.transposed
    }
    undeclared = {name for name, module in experts.items() if not hasattr(module, "is_transposed")}
    return _with_beside(model, have, _with_named(turned(record, own, undeclared), folder), folder)


@dataclasses.dataclass(frozen=True)
class _Renamed(Claims):
    """The rule of a file for modules under their present names."""

    old: Claims
    back: Mapping[str, str]

    def site(self, path: str) -> bool:
        return self.old.site(path) or self.old.site(self.back.get(path, path))

    def whole(self, path: str) -> bool:
        return self.old.whole(path) or self.old.whole(self.back.get(path, path))

    def ignored(self, path: str) -> bool:
        return self.old.ignored(path) and self.old.ignored(self.back.get(path, path))


def _with_present_names(model: nn.Module, have: Mapping[str, nn.Module], record: Record) -> Record:
    """The record with the model's present names, if it names modules that the model lacks and all can be renamed."""
    owners = [*record.sites, *record.replaced, *record.tied] or list(record.parts)
    if all(path in have for path in owners):
        return record
    rename = _renaming(model)
    other = {key.rpartition(".")[0] for key in (*record.beside, *record.frozen)}
    names = {path: path if path in have else rename(path) for path in {**dict.fromkeys(owners), **dict.fromkeys(other)}}
    if any(names[path] not in have for path in owners) or len(set(names.values())) < len(names):
        return record

    def moved(tensors: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for key, tensor in tensors.items():
            path = max((p for p in names if key.startswith(f"{p}.")), key=len, default="")
            found[key.replace(path, names[path], 1) if path else key] = tensor
        return found

    assert record.claims is not None
    return dataclasses.replace(
        record,
        method=record.method.renamed({name: names[name] for name in record.sites}),
        sites={names[n]: dataclasses.replace(site, name=names[n]) for n, site in record.sites.items()},
        tensors=moved(record.tensors),
        replaced=tuple(names[path] for path in record.replaced),
        tied={names[path]: dataclasses.replace(tie, to=names[tie.to]) for path, tie in record.tied.items()},
        frozen=moved(record.frozen),
        beside=moved(record.beside),
        parts={names.get(path, path): part for path, part in record.parts.items()},
        claims=_Renamed(record.claims, {new: old for old, new in names.items()}),
    )


def _renaming(model: nn.Module) -> Callable[[str], str]:
    """The function from the path of a module in old files to its path in this model, by transformers' own rules."""
    rules: list[Any] = []
    if hasattr(getattr(model, "config", None), "model_type"):
        try:
            found = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
            rules = [rule for rule in found if not hasattr(rule, "operations")]  # others also convert the values
        except (ImportError, AttributeError):  # a model of another library with such a configuration
            rules = []

    def rename(path: str) -> str:
        key = f"{path}.weight"
        for rule in rules:
            key = rule.rename_source_key(key)[0]
        return key.removesuffix(".weight")

    return rename


def _with_named(record: Record, folder: Path) -> Record:
    """The record without the sites that the settings do not name. Warns of them."""
    assert record.claims is not None
    out = [path for path in record.sites if record.claims.ignored(path)]
    if not out:
        return record
    if len(out) == len(record.sites):
        warnings.warn(
            f"{folder}: the settings name none of the modules that the file has factors for, such as {out[0]}; all of "
            f"them were loaded, but PEFT would refuse such a file",
            stacklevel=5,
        )
        return record
    warnings.warn(
        f"{folder}: left out the factors of {listed(out)}, because the settings (target_modules, exclude_modules, "
        f"layers_to_transform) do not name these modules; PEFT ignores them, too",
        stacklevel=5,
    )
    gone = tuple(f"{path}." for path in out)
    return dataclasses.replace(
        record,
        sites={path: site for path, site in record.sites.items() if path not in out},
        tied={path: tie for path, tie in record.tied.items() if tie.to not in out},
        tensors={key: tensor for key, tensor in record.tensors.items() if not key.startswith(gone)},
    )


def _with_beside(model: nn.Module, have: Mapping[str, nn.Module], record: Record, folder: Path) -> Record:
    """The record with a site for each module in `beside`; biases that equal the base's are left out.

    Trained tokens act on all modules that share the embedding's weight, as in PEFT. Raises FormatError if the model
    lacks a tensor, or if the bias of an unsupported module was trained.
    """
    if not record.beside:
        return record
    own = dict(base_tensors(model))
    odd = targets.unsupported(model, have)
    sites, tensors, tied, problems = dict(record.sites), dict(record.tensors), dict(record.tied), []
    for key, tensor in record.beside.items():
        path, _, name = key.rpartition(".")
        if name == "bias" and (key not in own or own[key].shape != tensor.shape):
            found = f"{list(own[key].shape)}" if key in own else "none"
            problems.append(f"the file has {key} {list(tensor.shape)}, the model {found}")
        elif name == "bias" and same_values(own[key].detach().cpu(), tensor):
            continue
        elif path in odd or path not in have:
            problems.append(f"{key} was trained, but {odd.get(path, 'the model has no such module')}")
        else:
            if path not in record.tied:
                sites[path] = targets.site_of(path, have[path])
            tensors[key] = tensor
    rows = {path: tensors.get(f"{path}.values") for path, part in record.parts.items() if part["method"] != NONE}
    groups = same_weight(model)
    for path in [path for path in rows if path in sites and sites[path].kind == "embedding"]:
        for other in next((group for group in groups if path in group), []):
            copied = other in rows and torch.equal(rows[other], rows[path])  # type: ignore[arg-type]
            if other != path and (other not in sites or copied):
                tied[other] = Tied(path, targets.site_of(other, have[other]).kind)
                sites.pop(other, None)  # PEFT writes the rows under the names of all modules that share the weight
                tensors.pop(f"{other}.values", None)
    if problems:
        raise FormatError(f"{folder}: {listed(problems)}")
    own_settings = {"method": record.method.name, **record.method.settings()}
    parts = {path: part for path, part in record.parts.items() if path in sites and part != own_settings}
    method = record.method
    if parts:
        try:
            method = Several({"method": method.name, **method.settings()}, patterns.exactly(parts))
        except ValueError as error:
            raise FormatError(f"{folder}: {error}") from None
    return dataclasses.replace(record, method=method, sites=sites, tensors=tensors, tied=tied, beside={}, parts={})
