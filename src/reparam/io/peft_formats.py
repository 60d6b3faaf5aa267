"""The methods that PEFT's files can hold, each with a format of its own, and what a PEFT folder holds.

A format is one class with `@peft_format(Method)` on it. Those of this project are the files `peft_*.py` in this folder;
anybody else's registers itself in the file of its method. A method without one is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from reparam.core.base import Site
from reparam.core.checks import listed
from reparam.core.method import Method
from reparam.core.registry import load_installed
from reparam.errors import FormatError
from reparam.io.native import parse_tensors, read_bytes
from reparam.io.peft_config import OTHERS
from reparam.io.record import Record

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""What every key of a tensor begins with; the path of a module follows."""

_M = TypeVar("_M", bound=Method)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder that PEFT wrote, whose settings were read."""

    path: Path
    settings: Mapping[str, Any]

    @property
    def config(self) -> Path:
        """The file of the settings."""
        return self.path / CONFIG

    @property
    def weights(self) -> Path:
        """The file of the tensors."""
        return self.path / WEIGHTS

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their keys. Raises FormatError for a damaged file, and for a pickle."""
        pickle = self.path / "adapter_model.bin"
        if not self.weights.exists() and pickle.exists():
            raise FormatError(
                f"{self.path}: adapter_model.bin is a pickle, which is never loaded; load it with PEFT and save it "
                f"again, which writes {WEIGHTS}"
            )
        return parse_tensors(read_bytes(self.weights), self.weights)


class PeftFormat(Generic[_M]):
    """How PEFT writes the adapters of one method. A subclass has no state."""

    peft_type: ClassVar[str]
    """The `peft_type` in the settings."""

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Whether a folder with these settings is of this format. Where several say so, the last one reads it."""
        return bool(settings.get("peft_type") == self.peft_type)

    def read(self, folder: Folder) -> Record:
        """The adapter in the folder. Raises FormatError, naming the key, for what cannot be honored."""
        raise NotImplementedError

    def check(self, method: _M, record: Record) -> None:
        """Raise FormatError for what PEFT has no equal of."""
        for kind in dict.fromkeys(site.kind for site in record.sites.values()):
            if kind not in ("linear", "embedding"):
                names = [name for name, site in record.sites.items() if site.kind == kind]
                raise FormatError(
                    f"PEFT has no equal of an update on a {kind}: {listed(names)}; save with format='reparam'"
                )

    def settings(self, method: _M, record: Record) -> dict[str, Any]:
        """The settings to be written."""
        raise NotImplementedError

    def tensors(self, name: str, site: Site, record: Record) -> dict[str, Tensor]:
        """The tensors of one site, without its bias, by the ends of their keys: what follows the site's path."""
        raise NotImplementedError


FORMATS: dict[type[Method], PeftFormat[Any]] = {}

_F = TypeVar("_F", bound=type[PeftFormat[Any]])


def peft_format(method: type[Method]) -> Callable[[_F], _F]:
    """Register a format for this method, and for no subclass of it."""

    def register(cls: _F) -> _F:
        assert method not in FORMATS, f"two formats are registered for {method.__name__}"
        FORMATS[method] = cls()
        return cls

    return register


def writer_of(method: Method) -> PeftFormat[Any]:
    """The format that writes this method. Raises FormatError where there is none."""
    if type(method) not in FORMATS:
        raise FormatError(f"PEFT has no equal of the method {method.name!r}; save with format='reparam'")
    return FORMATS[type(method)]


def reader_of(folder: Folder) -> PeftFormat[Any]:
    """The format of this folder, from an installed package too. Raises FormatError where no format reads it."""
    found = _registered_reader(folder)
    if found is None:
        load_installed("reparam.methods")
        found = _registered_reader(folder)
    if found is None:
        peft_type = folder.settings.get("peft_type")
        known = " and ".join(dict.fromkeys(one.peft_type for one in FORMATS.values()))
        raise FormatError(
            f"{folder.config}: peft_type {peft_type!r} is not read, only {known} are{OTHERS.get(str(peft_type), '')}"
        )
    return found


def _registered_reader(folder: Folder) -> PeftFormat[Any] | None:
    return next((one for one in reversed(FORMATS.values()) if one.reads(folder.settings)), None)
