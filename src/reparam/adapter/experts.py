"""Finished adapters as the experts of a mixture: read, checked against each other and the model, and put together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from reparam.adapter.updates import update_of
from reparam.core.base import Factors
from reparam.core.checks import listed
from reparam.core.method import Method
from reparam.errors import FormatError
from reparam.io import files
from reparam.io.record import Record
from reparam.sites.fingerprint import agree, fingerprint
from reparam.weights.dense import zero_weight


def assemble(model: nn.Module, method: Method, names: Sequence[str]) -> tuple[Method, dict[str, Tensor]]:
    """A method that names folders, with the ranks found in them, and the experts' tensors by their names in files.

    The folders are those of adapters or of training runs. `names` are the sites that are allowed. The result is the
    method itself and nothing, where it names no folders.
    Scales are folded into B, so that experts may have different ones. Raises FormatError for a folder without a whole
    adapter, for adapters that are no low-rank change, go on different sites or on sites that are not allowed, and for
    one that was trained on another base.
    """
    folders = method.expert_folders
    if not folders:
        return method, {}
    _check_apart(folders)
    records = {folder: files.read(files.adapter_folder(folder)) for folder in folders}
    _check(model, records, names)
    parts = {folder: _factors(folder, record) for folder, record in records.items()}
    first = next(iter(records.values()))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, ...]] = {}
    for site in first.sites:
        found = [part[site] for part in parts.values()]
        ranks[site] = tuple(len(factors.A) for factors in found)
        tensors[f"{site}.A"] = torch.cat([factors.A for factors in found])
        tensors[f"{site}.B"] = torch.cat([factors.B for factors in found], 1)
    return method.with_experts(_called(folders), ranks), tensors


def _check_apart(folders: Sequence[str]) -> None:
    where: dict[Path, str] = {}
    for folder in folders:
        path = files.adapter_folder(folder).resolve()
        if path in where:
            raise FormatError(f"experts: {where[path]} and {folder} are one adapter; name it once")
        where[path] = folder


def _check(model: nn.Module, records: dict[str, Record], names: Sequence[str]) -> None:
    digests = fingerprint(model)
    (one, first), *_ = records.items()
    for folder, record in records.items():
        whole = [*record.replaced, *(key for key in record.tensors if key.endswith(".bias"))]
        if whole:
            raise FormatError(f"{folder}: it also trains {listed(whole)} whole, which cannot be mixed")
        if record.base is not None and record.base.digests and not agree(record.base.digests, digests):
            raise FormatError(
                f"{folder}: trained on other weights than this model's (base: {record.base.source or 'unnamed'}), so "
                f"that it is no expert here"
            )
        apart = first.sites.keys() ^ record.sites.keys()
        if apart:
            raise FormatError(
                f"{folder} and {one} go on different sites: {listed(sorted(apart))} are in one of them alone; experts "
                f"of one mixture need the same targets"
            )
        outside = [site for site in record.sites if site not in names]
        if outside:
            raise FormatError(
                f"{folder}: it also goes on {listed(outside)}, which the targets leave out: name them too"
            )


@torch.no_grad()
def _factors(folder: str, record: Record) -> dict[str, Factors]:
    """A and s · B of an adapter, by site, in float32."""
    found = {}
    for name, site in record.sites.items():
        weight = zero_weight(site.out_features, site.in_features)
        try:
            update = update_of(record, name, weight)
            factors = update.factors(weight)
        except (ValueError, RuntimeError) as error:
            raise FormatError(f"{folder}: {record.method.name} at {name} is no expert: {error}") from error
        if factors.gain is not None or update.bias_delta() is not None:
            raise FormatError(
                f"{folder}: {record.method.name} changes {name} by more than a low-rank matrix, which cannot be mixed "
                f"with others; the experts of a mixture are LoRAs"
            )
        found[name] = Factors(factors.A.float(), factors.B.float())
    return found


def _called(folders: Sequence[str]) -> tuple[str, ...]:
    """What the experts are called: the ends of their paths, with numbers where they are not different."""
    ends = [path.parent.name if path.name == "adapter" else path.name for path in map(Path, folders)]
    return tuple(end if ends.count(end) == 1 else f"{end}-{i}" for i, end in enumerate(ends))
