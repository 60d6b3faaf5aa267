"""Fit the record of an adapter to a model, for what a file states that only the model can tell.

PEFT's `bias="all"` saves the biases of all modules. Those without other tensors in the file become sites here, whose
bias alone trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from reparam.adapter.same_base import same_values
from reparam.core.checks import listed
from reparam.errors import FormatError
from reparam.io.record import Record
from reparam.methods import patterns
from reparam.methods.several import NONE, Several
from reparam.sites import targets
from reparam.sites.fingerprint import base_tensors


def with_biases(model: nn.Module, have: Mapping[str, nn.Module], record: Record, folder: Path) -> Record:
    """The record with a site for each trained bias in `beside`; biases that equal the base's are left out.

    Raises FormatError if the model lacks a bias, or if the bias of an unsupported module was trained.
    """
    if not record.beside:
        return record
    own = dict(base_tensors(model))
    odd = targets.unsupported(model, have)
    sites, tensors, problems = dict(record.sites), dict(record.tensors), []
    for key, tensor in record.beside.items():
        path = key.removesuffix(".bias")
        if key not in own or own[key].shape != tensor.shape:
            found = f"{list(own[key].shape)}" if key in own else "none"
            problems.append(f"the file has {key} {list(tensor.shape)}, the model {found}")
        elif same_values(own[key].detach().cpu(), tensor):
            continue
        elif path in odd or path not in have:
            problems.append(f"{key} was trained, but {odd.get(path, 'the model itself is no site')}")
        else:
            sites[path] = targets.site_of(path, have[path])
            tensors[key] = tensor
    if problems:
        raise FormatError(f"{folder}: bias = 'all': {listed(problems)}")
    new = [path for path in sites if path not in record.sites]
    method = record.method
    if new:
        default = {"method": method.name, **method.settings()}
        method = Several(default, patterns.exactly({path: {"method": NONE} for path in new}))
    return dataclasses.replace(record, method=method, sites=sites, tensors=tensors, beside={})
