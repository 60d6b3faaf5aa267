"""Read saved adapters as the experts of a mixture, check them, and concatenate their factors."""

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
    """Read the experts of a mixture from the folders that the method names (adapters or training runs).

    Returns the method with the ranks of the experts, and their concatenated factors by their names in files: A
    [Σ R_i, I] and B [O, Σ R_i], with the scales multiplied into B. Without folders, returns the method unchanged and an
    empty dictionary. `names` are the sites that the targets allow.

    Raises FormatError if a folder holds no complete adapter or is named twice, or if an adapter is not a low-rank
    change, has sites that differ from the other adapters' or that `names` lacks, or was trained on a different base.
    """
    folders = method.expert_folders
    if not folders:
        return method, {}
    _check_apart(folders)
    records = {folder: files.read(files.adapter_folder(folder)).without_beside(folder) for folder in folders}
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
            raise FormatError(f"experts: {where[path]} and {folder} are the same adapter; name it once")
        where[path] = folder


def _check(model: nn.Module, records: dict[str, Record], names: Sequence[str]) -> None:
    digests = fingerprint(model)
    (one, first), *_ = records.items()
    for folder, record in records.items():
        if record.tied:
            raise FormatError(f"{folder}: one update of this adapter acts on tied weights, which a mixture cannot use")
        whole = [*record.replaced, *(key for key in record.tensors if key.endswith(".bias"))]
        if whole:
            raise FormatError(
                f"{folder}: this adapter also trains {listed(whole)}, and the experts of a mixture are low-rank "
                "changes alone; name an adapter that was trained without modules_to_save and biases"
            )
        if record.base is not None and record.base.digests and not agree(record.base.digests, digests):
            raise FormatError(
                f"{folder}: trained on a base with different weights ({record.base.source or 'unnamed'}), so it cannot "
                f"be an expert on this model; load that base, or name another adapter"
            )
        apart = first.sites.keys() ^ record.sites.keys()
        if apart:
            raise FormatError(
                f"{folder} and {one} adapt different modules: only one of them has {listed(sorted(apart))}; all "
                f"experts of a mixture need the same targets"
            )
        outside = [site for site in record.sites if site not in names]
        if outside:
            raise FormatError(
                f"{folder}: this adapter also changes {listed(outside)}, which the targets leave out; add them"
            )


@torch.no_grad()
def _factors(folder: str, record: Record) -> dict[str, Factors]:
    """The factors A [R, I] and s · B [O, R] of an adapter in float32, by site."""
    found = {}
    for name, site in record.sites.items():
        weight = zero_weight(site.out_features, site.in_features)
        try:
            update = update_of(record, name, weight)
            factors = update.factors(weight)
        except (ValueError, RuntimeError) as error:
            raise FormatError(f"{folder}: {record.method.name} at {name} cannot be an expert: {error}") from error
        if factors.gain is not None or update.bias_delta() is not None:
            raise FormatError(
                f"{folder}: {record.method.name} changes {name} by more than a low-rank matrix, which a mixture cannot "
                f"use; the experts of a mixture are LoRAs"
            )
        found[name] = Factors(factors.A.float(), factors.B.float())
    return found


def _called(folders: Sequence[str]) -> tuple[str, ...]:
    """The experts' names: the last component of each path, with its index appended if several are equal."""
    ends = [path.parent.name if path.name == "adapter" else path.name for path in map(Path, folders)]
    return tuple(end if ends.count(end) == 1 else f"{end}-{i}" for i, end in enumerate(ends))
