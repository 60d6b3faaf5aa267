"""Read an adapter and prove that it can be served, on a copy of the model that shares all tensors with it.

The copy is never called by the engine, so that an adapter can be put on it, and taken off, while steps run.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.attach import remove
from reparam.adapter.load import place
from reparam.adapter.selection import select
from reparam.adapter.slots import contents_of
from reparam.core.checks import listed
from reparam.errors import FormatError, InputDependentError
from reparam.hf import prompts
from reparam.hf.digest import digest_of
from reparam.io import files
from reparam.io.prompt_format import PromptFormat
from reparam.io.record import Record
from reparam.serve.banks import Contents
from reparam.serve.inside import check_no_pickle
from reparam.sites.expert_paths import experts_with
from reparam.sites.held import BANK
from reparam.sites.layout import Order
from reparam.sites.routing import SMALL, orders_of

PROBE = 16  # tokens of the probe, in two sequences
CHANGED = 8  # tokens that the adapter itself changes, at most, in the probe
NAME = "served"


@dataclasses.dataclass(frozen=True)
class Proven:
    """An adapter that can be served."""

    digest: str
    """SHA-256 of the method, its settings and all tensors, in hexadecimal."""
    method: str
    contents: Contents
    prompt_format: PromptFormat | None = None
    """How the adapter was trained to be asked, if its files say so."""


class Prover:
    """Reads adapters for one model."""

    def __init__(self, model: nn.Module) -> None:
        tensors = itertools.chain(model.parameters(), model.buffers())
        self._adapters: set[str] = set()
        self._structures: set[str] = set()
        """Those whose rows in a batch have been compared with what an adapter gives alone."""
        self._base: tuple[Tensor, Tensor] | None = None
        self.model: Any = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()

    def prove(self, folder: Path) -> Proven:
        """The adapter in a folder. Raises FormatError, which says why, if it is damaged or cannot be served.

        Its files must match the base and fit exactly, it must change outputs, all of them finite, and its outputs in a
        batch with the base must be those that it has alone. The last is computed once for adapters of one structure:
        the same method and settings, with the same shapes at the same sites.
        """
        if prompts.prompting_of(folder) is not None:
            raise _refused(folder, "it adds virtual tokens and changes no weights, so it has no place in a mixed batch")
        check_no_pickle(folder)
        record = files.read(folder)
        if record.replaced:
            raise _refused(folder, f"it trains whole modules ({listed(list(record.replaced))}), which no matrix holds")
        if record.tied:
            raise _refused(folder, f"it changes modules that share a weight ({listed(list(record.tied))})")
        adapter = place(self.model, record, folder, name=NAME, activate=False)
        try:
            return self._proven(adapter, record, folder)
        finally:
            remove(self.model, NAME)

    @torch.no_grad()
    def _proven(self, adapter: Adapter, record: Record, folder: Path) -> Proven:
        try:
            contents = {path: contents_of(site, NAME) for path, site in adapter.modules.items()}
        except InputDependentError as error:
            raise _refused(folder, f"no matrix stands for it: {error}") from None
        contents = {path: (own, bias) for path, (own, bias) in contents.items() if own is not None or bias is not None}
        for path, (factors, bias) in contents.items():
            for tensor in (*(factors or ()), bias):
                if tensor is not None and not bool(tensor.isfinite().all()):
                    raise FormatError(f"{folder}: its change of {path} is not finite")
        own = digest(record)
        if own not in self._adapters:  # the same bytes on the same base need no second proof
            self._probe(adapter, contents, folder, _structure(record, contents))
            self._adapters.add(own)
        return Proven(own, record.method.name, contents, record.prompt_format)

    def _probe(self, adapter: Adapter, contents: Contents, folder: Path, structure: str) -> None:
        rows = self._ids(adapter, contents)  # [2, T]
        base, own = self._base_scores(rows), self._scores(rows, NAME)
        if not bool(own.isfinite().all()):
            raise FormatError(f"{folder}: with it, the model's scores are not finite")
        if torch.equal(own, base):
            raise FormatError(f"{folder}: it does not change the model's outputs, so it is not trained, or damaged")
        if structure not in self._structures:
            self._probe_batch(rows, torch.cat([own[0], base[1]]), contents, folder)
            self._structures.add(structure)

    def _probe_batch(self, rows: Tensor, wanted: Tensor, contents: Contents, folder: Path) -> None:
        """Compare a batch of the adapter's row and the base's, rows [2, T], with the scores [2·T, V] of each alone."""
        positions = torch.arange(rows.shape[1], device=rows.device).repeat(2)[None]
        try:
            with select(self.model, [NAME, None], spans=[rows.shape[1]] * 2):
                packed = self.model(input_ids=rows.view(1, -1), position_ids=positions, use_cache=False)
        except ValueError as error:
            raise _refused(folder, str(error)) from None
        found = packed.logits[0].float()
        bound = 1e-3 if self.model.dtype is torch.float32 else 10 * SMALL
        if float((found - wanted).abs().max()) > bound * float(wanted.abs().max()):
            raise _refused(folder, "in a batch with the base, its outputs are not those that it has alone")
        odd = [path for path in contents if None in self._orders(path)]
        if odd:
            raise _refused(folder, f"which tokens {listed(odd)} get cannot be told")

    def _orders(self, path: str) -> list[Order | None]:
        site: Any = self.model.get_submodule(path)
        seen: Any = site.updates[BANK] if site.has_bank else experts_with(self.model, path)
        found: list[Order | None] = [order for (packed, _), order in orders_of(seen).items() if packed]
        return found or [None]

    def _base_scores(self, rows: Tensor) -> Tensor:
        """Those of the base, which are kept for the next adapter: most get the same probe."""
        if self._base is None or not torch.equal(self._base[0], rows):
            self._base = rows, self._scores(rows, None)
        return self._base[1]

    def _scores(self, rows: Tensor, name: str | None) -> Tensor:
        """rows [2, T] -> [2, T, V]."""
        with select(self.model, name):
            scores: Tensor = self.model(input_ids=rows, use_cache=False).logits.float()
        return scores

    def _ids(self, adapter: Adapter, contents: Contents) -> Tensor:
        """The ids of the probe [2, T]: some of the vocabulary, and of those whose embeddings the adapter changes."""
        embedding = self.model.get_input_embeddings()
        count = len(embedding.weight)
        ids = torch.randint(count, (PROBE,), generator=torch.Generator().manual_seed(0))
        for path, site in adapter.modules.items():
            factors = contents.get(path, (None, None))[0]
            if site is embedding and factors is not None:
                changed = factors.B.abs().sum(1).nonzero().flatten()[:CHANGED].cpu()
                ids = torch.cat([changed, ids])
        return ids[: len(ids) // 2 * 2].view(2, -1).to(embedding.weight.device)


def digest(record: Record) -> str:
    """SHA-256 of the method, its settings and all tensors of an adapter, in hexadecimal."""
    return hashlib.sha256(f"{_settings(record)}\n{digest_of(record.tensors)}".encode()).hexdigest()


def _settings(record: Record) -> str:
    return json.dumps([record.method.name, record.method.settings()], sort_keys=True, default=str)


def _structure(record: Record, contents: Contents) -> str:
    """What the computation of an adapter in a batch depends on, but for the values: method, settings, sites, shapes."""
    shapes = [
        (path, *(None if t is None else tuple(t.shape) for t in (*(factors or (None,) * 3), bias)))
        for path, (factors, bias) in sorted(contents.items())
    ]
    return f"{_settings(record)}\n{shapes}"


def _refused(folder: Path, why: str) -> FormatError:
    return FormatError(f"{folder}: cannot be served in a batch with others: {why}; merge it into a model of its own")
