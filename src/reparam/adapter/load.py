"""Putting a saved adapter on a model, strictly: every tensor has its place, every place its tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.attach import check_name, install, select
from reparam.core.checks import listed, nearest
from reparam.errors import FormatError
from reparam.io import files
from reparam.io.record import Record
from reparam.sites import targets
from reparam.sites.fingerprint import agree, base_tensors, fingerprint
from reparam.sites.module import Replaced
from reparam.sites.walk import base_parameters, walk


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

    Reads this project's format and PEFT's. `check_base=False` allows another base than the one it was trained on, of
    the same shapes. Raises `FormatError` (a ValueError) that names the file and the tensor for anything that is
    missing, extra, of the wrong shape, damaged, edited or made for another base, for tied weights and for a clash with
    another adapter, and ValueError for a name that is taken; the model is then as it was.
    """
    check_name(model, name)
    record = files.read(folder, name)
    adapter = place(model, record, Path(folder), name=name, activate=activate, check_base=check_base)
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
    """Put an adapter that was read on `model`, as `load` does. Messages call it by `folder`."""
    have = dict(walk(model))
    _check_model(model, have, record, folder)
    if check_base:
        _check_base(model, record, folder)
    _check_frozen(model, record, folder, values=check_base)
    biased = any(f"{site}.bias" in record.tensors for site in record.sites)
    try:
        adapter = install(
            model,
            record.method,
            names=[path for path in have if path in record.sites],
            replaced=[path for path in have if path in record.replaced],
            name=name,
            bias=biased,
            check=lambda wanted: _check_fit(wanted, record, folder),
        )
    except FormatError:
        raise
    except (ValueError, re.error, RuntimeError) as error:  # ties, clashes; a pattern or a rank that nobody saved
        raise FormatError(f"{folder}: cannot be put on this model: {error}") from error
    fill(adapter, record, folder)
    for _, parameter in base_parameters(model):
        parameter.requires_grad_(False)
    adapter.requires_grad_(False)
    if activate:
        select(model, name)
    return adapter


def fill(adapter: Adapter, record: Record, folder: Path) -> None:
    """Copy every tensor into its parameter. Raises FormatError with all that is missing, extra or misshapen.

    An update that training makes smaller takes on the saved shapes first.
    """
    for site, update in adapter.updates.items():
        update.fit(record.of(site))
    wanted = adapter.tensors()
    _check_fit(wanted, record, folder)
    for key, value in wanted.items():
        value.copy_(record.tensors[key])


def _check_fit(wanted: Mapping[str, Tensor], record: Record, folder: Path) -> None:
    """The file has exactly the tensors that the adapter has, of the same shapes and kinds."""
    problems = [f"missing {key}" for key in wanted if key not in record.tensors]
    problems += [f"unknown {key}" for key in record.tensors if key not in wanted]
    for key in wanted.keys() & record.tensors.keys():
        value, found = wanted[key], record.tensors[key]
        if found.shape != value.shape:
            problems.append(f"{key} has shape {list(found.shape)}, expected {list(value.shape)}")
        elif found.dtype != value.dtype and not (found.is_floating_point() and value.is_floating_point()):
            problems.append(f"{key} is {found.dtype}, expected {value.dtype}")
    if problems:
        raise FormatError(f"{folder}: tensors do not fit: {listed(problems)}")


def _check_model(model: nn.Module, have: Mapping[str, nn.Module], record: Record, folder: Path) -> None:
    """The model has every site, with the right sizes, and no other adapter in the way."""
    lost = [name for name in (*record.sites, *record.replaced) if name not in have]
    for name in lost:
        inside = [path for path, m in have.items() if isinstance(m, Replaced) and name.startswith(path + ".")]
        if inside:
            raise FormatError(f"{folder}: {name} is part of {inside[0]}, which another adapter here trains whole")
    if lost:
        raise FormatError(
            f"{folder}: made for modules that this {type(model).__name__} lacks ({len(lost)}, first: {lost[0]})"
            f"{nearest(lost[0], have)}; was it trained on another architecture?"
        )
    problems = [f"{name}: {why}" for name in record.sites if (why := targets.unsupported_reason(have[name]))]
    if problems:
        raise FormatError(f"{folder}: {listed(problems)}")
    for name, site in record.sites.items():
        found = targets.site_of(name, have[name])
        if (found.kind, found.out_features, found.in_features) != (site.kind, site.out_features, site.in_features):
            problems.append(
                f"{name} was a {site.kind} of {site.out_features} x {site.in_features}, and is {found.kind}, "
                f"{found.out_features} x {found.in_features}, here"
            )
    if problems:
        raise FormatError(f"{folder}: {listed(problems)}; was it trained on another base?")
    if record.claims is not None:
        _check_claims(have, record, folder)


def _check_claims(have: Mapping[str, nn.Module], record: Record, folder: Path) -> None:
    """What the file says that it holds, it holds."""
    assert record.claims is not None
    missing = []
    for path, module in have.items():
        inside = any(f"{path}.".startswith(f"{whole}.") for whole in record.replaced)
        site = path not in record.sites and targets.is_matrix(module) and record.claims.site(path)
        whole = record.claims.whole(path) and any(True for _ in module.parameters())
        if (site or whole) and not inside:
            missing.append(path)
    if missing:
        raise FormatError(
            f"{folder}: its settings name modules that it holds no tensors for: {listed(missing)}; the file is not "
            f"whole, or this is not the model it was made for"
        )


def _check_base(model: nn.Module, record: Record, folder: Path) -> None:
    """The model is the one the adapter was trained on, as far as the file says."""
    if record.base is not None and record.base.digests:
        if record.base.architecture != type(model).__name__:
            raise FormatError(
                f"{folder}: trained on a {record.base.architecture}, this is a {type(model).__name__}; pass "
                f"check_base=False if that is meant"
            )
        if not agree(record.base.digests, fingerprint(model)):
            raise FormatError(
                f"{folder}: trained on other weights than this model's (base: {record.base.source or 'unnamed'}); load "
                f"that base, or pass check_base=False if an adapter on changed weights is meant"
            )


def _check_frozen(model: nn.Module, record: Record, folder: Path, *, values: bool) -> None:
    """What the file carries along of the base is in the model, and, if asked, has the same values there."""
    own = dict(base_tensors(model)) if record.frozen else {}
    for key, tensor in record.frozen.items():
        if key not in own:
            raise FormatError(f"{folder}: unknown tensor {key}: neither the adapter nor the model has a place for it")
        shape = list(own[key].shape)
        if list(tensor.shape) != shape or (values and not _same(own[key].detach().cpu(), tensor)):
            raise FormatError(
                f"{folder}: carries its own {key} {list(tensor.shape)}, which differs from the base's {shape}; was the "
                f"vocabulary resized? Load the base it was trained on"
            )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are equal, as far as the coarser of their dtypes can tell."""
    if not (one.is_floating_point() and other.is_floating_point()):
        return torch.equal(one, other)
    coarse = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(one.to(coarse), other.to(coarse))
