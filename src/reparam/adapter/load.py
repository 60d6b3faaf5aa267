"""Load a saved adapter onto a model. The adapter's tensors and the file's tensors must match exactly."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.attach import check_name, install
from reparam.adapter.fitted import fitted
from reparam.adapter.same_base import check_base_of, check_frozen, check_has_values, warn_of_other_base
from reparam.adapter.selection import select
from reparam.adapter.tie import copies_together
from reparam.core.checks import listed, nearest
from reparam.core.text import counted
from reparam.errors import FormatError
from reparam.io import files
from reparam.io.record import Record
from reparam.sites import targets
from reparam.sites.experts import opened
from reparam.sites.replaced import Replaced
from reparam.sites.walk import base_parameters, walk
from reparam.sites.wrapped import bare, check_trainable


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = "default",
    activate: bool = True,
    check_base: bool = True,
    trainable: bool = False,
) -> Adapter:
    """Put a saved adapter on `model` and select it unless `activate` is False.

    The base model is frozen, as by `attach`; so is the adapter, unless `trainable` is True.

    `folder` is that of the adapter, in the reparam format or the PEFT format, or of its training run.
    `check_base=False` allows a different base model of the same shapes than the one that the adapter was trained on.

    Raises ValueError if the name is invalid or taken, and FormatError (a ValueError) that names the file and the tensor
    if a tensor is missing, unexpected or of the wrong shape, a file is damaged or edited, the adapter was trained on a
    different base, weights are tied, or another adapter conflicts. The model is then unchanged.
    """
    if trainable:
        check_trainable(model)
    model = bare(model)
    check_name(model, name)
    folder = files.adapter_folder(folder)
    record = files.read(folder, name)
    adapter = place(model, record, folder, name=name, activate=activate, check_base=check_base)
    return adapter.requires_grad_(trainable)


def place(
    model: nn.Module,
    record: Record,
    folder: Path,
    *,
    name: str,
    activate: bool = True,
    check_base: bool = True,
) -> Adapter:
    """Put an adapter on `model` as `load` does, from a record in memory. `folder` names the adapter in messages."""
    model = bare(model)
    with opened(model):
        have = dict(walk(model))
        record = fitted(model, have, record, folder)
        _check_model(model, have, record, folder)
        compared = bool(record.frozen) or (check_base and record.base is not None and bool(record.base.digests))
        check_has_values(model, record, folder, everywhere=compared)
        if check_base:
            check_base_of(model, record, folder)
            warn_of_other_base(model, record, folder)
        check_frozen(model, record, folder, values=check_base)
        biased = any(f"{site}.bias" in record.tensors for site in (*record.sites, *record.tied))
        try:
            adapter = install(
                model,
                record.method,
                names=[path for path in have if path in record.sites or path in record.tied],
                replaced=[path for path in have if path in record.replaced],
                name=name,
                bias=biased,
                tied={path: tie.to for path, tie in record.tied.items()}
                | copies_together(model, record.tensors, record.replaced),
                check=lambda wanted: _check_fit(wanted, record, folder),
            )
        except FormatError:
            raise
        except (ValueError, re.error, RuntimeError) as error:  # tied weights, conflicts; an invalid pattern or rank
            raise FormatError(f"{folder}: this adapter cannot be put on this model: {error}") from error
        fill(adapter, record, folder)
        adapter.prompt_format = record.prompt_format
        adapter.head = record.head
        for _, parameter in base_parameters(model):
            parameter.requires_grad_(False)
        adapter.requires_grad_(False)
        if activate:
            select(model, name)
        return adapter


def fill(adapter: Adapter, record: Record, folder: Path) -> None:
    """Copy every saved tensor into its parameter.

    An update whose rank shrinks during training is first resized to the saved shapes. Raises FormatError that lists the
    tensors that are missing, unexpected or of the wrong shape or dtype.
    """
    for site, update in adapter.updates.items():
        update.fit(record.of(site))
    wanted = adapter.tensors()
    _check_fit(wanted, record, folder)
    for key, value in wanted.items():
        value.copy_(record.tensors[key])


def _check_fit(wanted: Mapping[str, Tensor], record: Record, folder: Path) -> None:
    """Raise FormatError unless the file has exactly the adapter's tensors, with the same shapes and kinds of dtype."""
    problems = [f"missing {key}" for key in wanted if key not in record.tensors]
    problems += [f"unknown {key}" for key in record.tensors if key not in wanted]
    for key in wanted.keys() & record.tensors.keys():
        value, found = wanted[key], record.tensors[key]
        if found.shape != value.shape:
            problems.append(f"{key} has shape {list(found.shape)}, expected {list(value.shape)}")
        elif found.dtype != value.dtype and not (found.is_floating_point() and value.is_floating_point()):
            problems.append(f"{key} is {found.dtype}, expected {value.dtype}")
    if problems:
        raise FormatError(f"{folder}: the tensors do not match the adapter: {listed(problems)}")


def _check_model(model: nn.Module, have: Mapping[str, nn.Module], record: Record, folder: Path) -> None:
    """Raise FormatError unless the model has every site with the right shape, and no other adapter conflicts."""
    sites = record.sites | {
        path: dataclasses.replace(record.sites[tie.to], name=path, kind=tie.kind) for path, tie in record.tied.items()
    }
    lost = [name for name in (*sites, *record.replaced) if name not in have]
    for name in lost:
        inside = [path for path, m in have.items() if isinstance(m, Replaced) and name.startswith(path + ".")]
        if inside:
            raise FormatError(f"{folder}: {name} is part of {inside[0]}, which another adapter trains whole")
    if lost:
        raise FormatError(
            f"{folder}: this {type(model).__name__} lacks {counted(len(lost), 'module')} of the adapter (first: "
            f"{lost[0]}){nearest(lost[0], have)}; was it trained on another architecture?"
        )
    odd = targets.unsupported(model, have)
    problems = [f"{name}: {odd[name]}" for name in sites if name in odd]
    if problems:
        raise FormatError(f"{folder}: {listed(problems)}")
    for name, site in sites.items():
        found = targets.site_of(name, have[name])
        if (found.kind, found.out_features, found.in_features) != (site.kind, site.out_features, site.in_features):
            problems.append(
                f"{name} is {found.kind}, {found.out_features} x {found.in_features}, in this model; the adapter was "
                f"trained on {site.kind}, {site.out_features} x {site.in_features}"
            )
    if problems:
        raise FormatError(f"{folder}: {listed(problems)}; was it trained on another base?")
    if record.claims is not None:
        _check_claims(have, record, folder)


def _check_claims(have: Mapping[str, nn.Module], record: Record, folder: Path) -> None:
    """Raise FormatError if the file's settings name modules for which it has no tensors.

    Modules in a part of the model for which the file has nothing at all, such as the vision tower of an adapter for the
    language model, only give a warning: they stay unchanged, as in PEFT.
    """
    assert record.claims is not None
    known = {_part(path) for path in (*record.sites, *record.replaced, *record.tied)}
    missing: list[str] = []
    apart: list[str] = []
    for path, module in have.items():
        inside = any(f"{path}.".startswith(f"{whole}.") for whole in record.replaced)
        site = (
            path not in record.sites
            and path not in record.tied
            and targets.is_matrix(module)
            and targets.site_of(path, module).kind not in ("expert", "router")  # which PEFT names as parameters
            and record.claims.site(path)
        )
        whole = record.claims.whole(path) and any(True for _ in module.parameters())
        if (site or whole) and not inside:
            (missing if whole or _part(path) in known else apart).append(path)
    if missing:
        raise FormatError(
            f"{folder}: the settings name modules without tensors: {listed(missing)}; the file is incomplete, or was "
            f"made for another model"
        )
    if apart:
        parts = list(dict.fromkeys(map(_part, apart)))
        warnings.warn(
            f"{folder}: the settings also name modules in {listed(parts)}, for which the file has no tensors; "
            f"{len(apart)} modules stay unchanged (first: {apart[0]})",
            stacklevel=4,
        )


def _part(path: str) -> str:
    """The part of a model that holds this module: the list of layers that it is in, or else the module above it."""
    layered = re.match(r"(.*?)\.\d+\.", path)
    return layered[1] if layered else path.rpartition(".")[0]
