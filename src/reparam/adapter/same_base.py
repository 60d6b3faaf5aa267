"""Whether a model is the base that an adapter was trained on: its values, its digests, its name."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from reparam.core.placing import offload_of
from reparam.core.surface import advice
from reparam.errors import FormatError
from reparam.io.record import Record
from reparam.sites.fingerprint import agree, base_modules, base_tensors, fingerprint
from reparam.sites.walk import base_parameters


def check_has_values(model: nn.Module, record: Record, folder: Path, *, everywhere: bool) -> None:
    """Raise FormatError if a module that the adapter changes is on the device "meta", which holds no values.

    With `everywhere`, no other module may be there either, because its values are compared.
    """
    own = {*record.sites, *record.replaced}
    elsewhere = {path for path, module in base_modules(model) if offload_of(module) is not None}
    empty = [
        path
        for path, parameter in base_parameters(model)
        if parameter.is_meta
        and path not in elsewhere
        and (everywhere or path in own or any(path.startswith(f"{whole}.") for whole in record.replaced))
    ]
    if empty:
        raise FormatError(
            f"{folder}: {len(dict.fromkeys(empty))} modules of this model are on the device 'meta' (first: "
            f"{empty[0] or 'the model itself'}), which holds no values, so the adapter's values would be lost; load "
            f"the base's weights first"
        )


def check_base_of(model: nn.Module, record: Record, folder: Path) -> None:
    """Raise FormatError if the file states another base: another model class, or other weights."""
    if record.base is not None and record.base.digests:
        remedy = advice("load that base, or pass check_base=False to use this one", "give that base with --base")
        if record.base.architecture != type(model).__name__:
            raise FormatError(
                f"{folder}: trained on a {record.base.architecture}, but this model is a {type(model).__name__}; "
                f"{remedy}"
            )
        found = fingerprint(model, without=record.replaced)
        # Earlier releases digested the modules that the adapter replaces, too, and experts in another group.
        if not (
            agree(record.base.digests, found)
            or agree(record.base.digests, fingerprint(model))
            or agree(record.base.digests, fingerprint(model, without=record.replaced, stacks=False))
        ):
            raise FormatError(
                f"{folder}: trained on a base with different weights ({record.base.source or 'unnamed'}); {remedy}"
            )


def warn_of_other_base(model: nn.Module, record: Record, folder: Path) -> None:
    """Warn if the files name another base than the one that the model was loaded from, and have no digests of it.

    A local folder and a Hub id are the same base if the folder has the name of the id.
    """
    named = record.base.source if record.base is not None and not record.base.digests else ""
    used = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if named and used and not _same_source(named, used):
        warnings.warn(
            f"{folder}: made for the base {named!r}, but this model was loaded from {used!r}, and a PEFT folder has no "
            f"digest of its base to compare; check that the two have the same weights",
            stacklevel=4,
        )


def _same_source(one: str, other: str) -> bool:
    """Whether two folders or Hub ids can name the same model."""
    paths = [Path(name).expanduser() for name in (one, other)]
    if one == other or paths[0].resolve() == paths[1].resolve():
        return True
    if all(path.is_dir() for path in paths):
        return False
    hub = [_hub_id(name) for name in (one, other)]
    if all(hub):
        return hub[0] == hub[1]
    return paths[0].name.lower() == paths[1].name.lower()


def _hub_id(name: str) -> str:
    """The Hub id that this name or this folder in the cache of the Hub stands for; "" for any other folder."""
    cached = re.search(r"(?:^|/)models--([^/]+)--([^/]+)/snapshots/", name)
    if cached:
        return f"{cached[1]}/{cached[2]}".lower()
    return name.lower() if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else ""


def check_frozen(model: nn.Module, record: Record, folder: Path, *, values: bool) -> None:
    """Raise FormatError unless the model has the base tensors that the file contains, of the same shapes.

    With `values`, their values must be equal too.
    """
    own = dict(base_tensors(model)) if record.frozen else {}
    for key, tensor in record.frozen.items():
        if key not in own:
            raise FormatError(f"{folder}: unknown tensor {key}: neither the adapter nor the model has such a parameter")
        shape = list(own[key].shape)
        if list(tensor.shape) != shape or (values and not same_values(own[key].detach().cpu(), tensor)):
            raise FormatError(
                f"{folder}: contains a copy of {key} {list(tensor.shape)} that differs from the base's {shape}; load "
                f"the base that it was trained on (was the vocabulary resized?)"
            )


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of the same shape are equal after a cast to the less precise of their dtypes."""
    if not (one.is_floating_point() and other.is_floating_point()):
        return torch.equal(one, other)
    coarse = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(one.to(coarse), other.to(coarse))
