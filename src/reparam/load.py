"""Putting a saved adapter on a model, strictly: every tensor has its place, every place its tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from reparam import targets
from reparam.adapter import Adapter, install, remove, select
from reparam.base import nearest
from reparam.fingerprint import base_tensors, fingerprint
from reparam.io import files
from reparam.io.record import FormatError, Record


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = "default",
    activate: bool = True,
    check_base: bool = True,
) -> Adapter:
    """Put a saved adapter on `model`, frozen, and select it unless `activate` is False.

    Reads this project's format and PEFT's. `check_base=False` allows another base than the one it was trained on, of
    the same shapes. Raises `FormatError` (a ValueError) that names the file and the tensor for anything that is
    missing, extra, of the wrong shape, damaged, edited or made for another base; the model is then as it was.
    """
    folder = Path(folder)
    record = files.read(folder)
    _check_model(model, record, folder)
    if check_base:
        _check_base(model, record, folder)
    biased = any(f"{site}.bias" in record.tensors for site in record.sites)
    adapter = install(
        model, record.method, names=list(record.sites), replaced=list(record.replaced), name=name, bias=biased
    )
    try:
        _fill(adapter, record, folder)
    except FormatError:
        remove(model, name)
        raise
    adapter.requires_grad_(False)
    if activate:
        select(model, name)
    return adapter


def _check_model(model: nn.Module, record: Record, folder: Path) -> None:
    """The model has every site, with the right sizes."""
    have = dict(targets.walk(model))
    lost = [name for name in (*record.sites, *record.replaced) if name not in have]
    if lost:
        raise FormatError(
            f"{folder}: made for modules that this {type(model).__name__} lacks ({len(lost)}, first: {lost[0]})"
            f"{nearest(lost[0], have)}; was it trained on another architecture?"
        )
    targets.resolve(model, list(record.sites))
    for name, site in record.sites.items():
        found = targets.sizes(have[name])
        if found != (site.kind, site.out_features, site.in_features):
            raise FormatError(
                f"{folder}: {name} was a {site.kind} of {site.out_features} x {site.in_features}, and is "
                f"{found[0]}, {found[1]} x {found[2]}, here; was it trained on another base?"
            )


def _check_base(model: nn.Module, record: Record, folder: Path) -> None:
    """The model is the one the adapter was trained on, as far as the file says."""
    if record.base is not None and record.base.digests:
        now = fingerprint(model)
        if record.base.architecture != type(model).__name__:
            raise FormatError(
                f"{folder}: trained on a {record.base.architecture}, this is a {type(model).__name__}; pass "
                f"check_base=False if that is meant"
            )
        if any(now.get(key, digest) != digest for key, digest in record.base.digests.items()):
            raise FormatError(
                f"{folder}: trained on other weights than this model's (base: {record.base.source or 'unnamed'}); load "
                f"that base, or pass check_base=False if an adapter on changed weights is meant"
            )
    if record.frozen:
        own = dict(base_tensors(model))
        for key, tensor in record.frozen.items():
            same = key in own and own[key].shape == tensor.shape and torch.equal(own[key].cpu().to(tensor.dtype), tensor)
            if not same:
                raise FormatError(
                    f"{folder}: carries its own {key} {list(tensor.shape)}, which differs from the base's; was the "
                    f"vocabulary resized? Load the base it was trained on"
                )


def _fill(adapter: Adapter, record: Record, folder: Path) -> None:
    """Copy every tensor into its parameter. Raises FormatError with all that is missing, extra or misshapen."""
    wanted: dict[str, torch.Tensor] = {name: p for name, p, _ in adapter.named_parameters()}
    for path, module in adapter.replaced.items():
        wanted |= {f"{path}.{name}": buffer for name, buffer in module.updates[adapter.name].named_buffers()}
    problems = [f"missing {key}" for key in wanted if key not in record.tensors]
    problems += [f"unknown {key}" for key in record.tensors if key not in wanted]
    problems += [
        f"{key} has shape {list(record.tensors[key].shape)}, expected {list(value.shape)}"
        for key, value in wanted.items()
        if key in record.tensors and record.tensors[key].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise FormatError(f"{folder}: tensors do not fit: {shown}")
    with torch.no_grad():
        for key, value in wanted.items():
            value.copy_(record.tensors[key])
