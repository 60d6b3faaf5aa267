"""`Record`: an adapter as plain data, which every file format reads and writes."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from torch import Tensor

from reparam.core.base import Kind, Site
from reparam.core.checks import listed
from reparam.core.method import Method
from reparam.errors import FormatError
from reparam.io.head import Head
from reparam.io.prompt_format import PromptFormat


@dataclasses.dataclass(frozen=True)
class Packing:
    """Matrices of the base that were quantized with the same storage while the adapter was trained."""

    storage: str
    """Name of the storage."""
    settings: dict[str, Any]
    """Settings of the storage."""
    modules: tuple[str, ...]
    """Paths of the modules that hold the matrices."""


@dataclasses.dataclass(frozen=True)
class Base:
    """The base model that an adapter was trained on."""

    architecture: str
    """Name of the model's class; empty when unknown."""
    source: str
    """Folder or Hub id that the model was loaded from; empty when unknown. Not used for checks."""
    digests: dict[str, str]
    """Fingerprints of the model's weights, see `fingerprint`. Empty when unknown."""
    packing: tuple[Packing, ...] = ()
    """The quantized matrices of the model; all other matrices were dense."""


class Claims(Protocol):
    """The rule in a file that states for which module paths of the model the file holds tensors."""

    def site(self, path: str) -> bool:
        """Whether the file must have an update for the linear map or embedding at this path."""

    def whole(self, path: str) -> bool:
        """Whether the file must have a copy of the whole module at this path."""

    def ignored(self, path: str) -> bool:
        """Whether the update at this path does not count, although the file has one."""


@dataclasses.dataclass(frozen=True)
class Tied:
    """A module that shares its weight with a site, and uses the update there."""

    to: str
    """Path of the site."""
    kind: Kind
    """Kind of the module; its sizes are those of the site."""


@dataclasses.dataclass(frozen=True)
class Record:
    """An adapter as plain data, without its model."""

    method: Method
    sites: dict[str, Site]
    tensors: dict[str, Tensor]
    """Tensors by name: `<site>.<parameter>`, `<site>.bias`, or `<module>.<parameter>` for modules that train whole."""
    replaced: tuple[str, ...] = ()
    """Paths of the modules that train whole."""
    base: Base | None = None
    """The base model; None when unknown."""
    tied: dict[str, Tied] = dataclasses.field(default_factory=dict)
    """The modules, by path, that use the update of a site because they share its weight."""
    frozen: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Copies of base tensors that the file contains; the base must hold the same values."""
    beside: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Tensors, by name, of modules whose kind and sizes only the model tells. `adapter/fitted.py` makes them sites;
    code without a model must refuse them (`without_beside`)."""
    parts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Name and settings of the method of each module in `beside`, by path, as `Several` takes them."""
    modules: tuple[str, ...] = ()
    """Paths of all modules of the base, for formats that name modules by the ends of their paths. Empty when read."""
    experts: dict[str, int] = dataclasses.field(default_factory=dict)
    """The base's modules with stacked weights of experts, by path, with the number of experts. Empty when read."""
    model_type: str = ""
    """The `model_type` of the base's configuration; "" when unknown."""
    prompt_format: PromptFormat | None = None
    """How the adapter is prompted; None when unknown."""
    head: Head | None = None
    """What the model is for; None for a causal language model, and when unknown."""
    claims: Claims | None = None
    """The modules for which the file states to hold tensors, if this can be checked only with the model."""

    def apart(self) -> Record:
        """The same adapter with a site and tensors of its own for each module that uses the update of a site."""
        sites, tensors = dict(self.sites), dict(self.tensors)
        for path, tie in self.tied.items():
            sites[path] = dataclasses.replace(self.sites[tie.to], name=path, kind=tie.kind, transposed=False)
            tensors |= {f"{path}.{name}": tensor for name, tensor in self.of(tie.to).items()}
        return dataclasses.replace(self, sites=sites, tensors=tensors)

    def of(self, path: str) -> dict[str, Tensor]:
        """The tensors of the site, module or shared state at this path, by their names in it, without a site's bias."""
        start = f"{path}."
        own = {key.removeprefix(start): tensor for key, tensor in self.tensors.items() if key.startswith(start)}
        return {key: tensor for key, tensor in own.items() if path not in self.sites or key != "bias"}

    def without_beside(self, label: object) -> Record:
        """This record. Raises FormatError if it has tensors in `beside`; `label` names the adapter in the message."""
        if self.beside:
            raise FormatError(
                f"{label}: this adapter also trains biases or tokens of modules without factors "
                f"({listed(list(self.beside))}), which can be used only with the model; load it onto the model, and "
                f"save it in reparam's format"
            )
        return self
