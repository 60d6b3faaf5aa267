"""An adapter as plain data: what every file format reads and writes."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from torch import Tensor

from reparam.core.base import Site
from reparam.core.method import Method


@dataclasses.dataclass(frozen=True)
class Packing:
    """Matrices of the base that were quantized in one way while the adapter was trained."""

    storage: str
    """Name of the storage."""
    settings: dict[str, Any]
    modules: tuple[str, ...]
    """Paths of the modules that hold them."""


@dataclasses.dataclass(frozen=True)
class Base:
    """Which model an adapter was trained on."""

    architecture: str
    """Class of the model."""
    source: str
    """Folder or hub id that it was loaded from, as far as the model knows; not used for checks."""
    digests: dict[str, str]
    """Fingerprints of its weights, see `fingerprint`. Empty when unknown."""
    packing: tuple[Packing, ...] = ()
    """How its matrices were quantized; what is in none of these was dense."""


class Claims(Protocol):
    """A rule by which a file tells what it holds tensors for. The model it is loaded into has the paths."""

    def site(self, path: str) -> bool:
        """Whether there must be an update for the linear map or embedding at this path."""

    def whole(self, path: str) -> bool:
        """Whether there must be a copy of the whole module at this path."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything that an adapter is, apart from the model it sits in."""

    method: Method
    sites: dict[str, Site]
    tensors: dict[str, Tensor]
    """`<site>.<parameter>`, `<site>.bias`, `<module>.<parameter>` for modules replaced whole."""
    replaced: tuple[str, ...] = ()
    """Paths of the modules that are replaced whole."""
    base: Base | None = None
    frozen: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Tensors of the base that the file carries along; the base must hold the same values."""
    modules: tuple[str, ...] = ()
    """Paths of all modules of the base, for formats that name modules by the ends of their paths. Empty when read."""
    claims: Claims | None = None
    """What the file says about its own completeness, where that takes the model to check."""

    def of(self, path: str) -> dict[str, Tensor]:
        """The tensors of what is at this path, a site say, by their names in it; without the bias of a site."""
        start = f"{path}."
        own = {key.removeprefix(start): tensor for key, tensor in self.tensors.items() if key.startswith(start)}
        return {key: tensor for key, tensor in own.items() if path not in self.sites or key != "bias"}
