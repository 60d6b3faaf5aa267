"""The registry of PEFT file formats, one for each method that PEFT supports.

A format is a class with the decorator `@peft_format(Method)`. Reparam's formats are in the modules `peft_*.py` of this
package. A method in another package registers its format in its own module. Methods without a format are refused.
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
from reparam.io.peft_config import OTHERS
from reparam.io.peft_weights import read_weights, weights_file
from reparam.io.record import Record

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""Prefix of every tensor key in a PEFT file, followed by the path of the module."""

_M = TypeVar("_M", bound=Method)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder that PEFT wrote, with its parsed `adapter_config.json`."""

    path: Path
    settings: Mapping[str, Any]

    @property
    def config(self) -> Path:
        """Path of `adapter_config.json`."""
        return self.path / CONFIG

    @property
    def weights(self) -> Path:
        """Path of the weights, `adapter_model.safetensors` or `adapter_model.bin`."""
        return weights_file(self.path)

    def tensors(self) -> dict[str, Tensor]:
        """Read the tensors, by key. Raises FormatError if the file is damaged or not PEFT's."""
        return read_weights(self.path)


class PeftFormat(Generic[_M]):
    """PEFT's file format of one method. Subclasses are stateless."""

    ties: ClassVar[bool] = False
    """Whether the files can tie the update of an output head to that of the embedding (`ensure_weight_tying`)."""
    experts: ClassVar[bool] = False
    """Whether the files can hold updates of experts and routers (`target_parameters`)."""
    peft_type: ClassVar[str]
    """Value of `peft_type` in the settings."""

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Whether this format can read a folder with these settings. The last registered format that can reads it."""
        return bool(settings.get("peft_type") == self.peft_type)

    def read(self, folder: Folder) -> Record:
        """Read the adapter in the folder. Raises FormatError that names each unsupported key."""
        raise NotImplementedError

    def check(self, method: _M, record: Record) -> None:
        """Raise FormatError if PEFT cannot express the adapter. The base class refuses sites such as vectors."""
        for path, tie in record.tied.items():
            if not self.ties or (record.sites[tie.to].kind, tie.kind) != ("embedding", "linear"):
                raise FormatError(
                    f"PEFT ties only a LoRA on an output head to one on the embedding, not {method.name} on {path} to "
                    f"{tie.to}; save with format='reparam'"
                )
        for kind in dict.fromkeys(site.kind for site in record.sites.values()):
            if kind not in ("linear", "embedding", *(("expert", "router") if self.experts else ())):
                names = [name for name, site in record.sites.items() if site.kind == kind]
                what = f"{method.name} on an" if kind == "expert" else "an update on a"
                raise FormatError(
                    f"PEFT has no equivalent of {what} {kind}: {listed(names)}; save with format='reparam'"
                )

    def settings(self, method: _M, record: Record) -> dict[str, Any]:
        """The contents of `adapter_config.json`."""
        raise NotImplementedError

    def tensors(self, name: str, site: Site, record: Record) -> dict[str, Tensor]:
        """The tensors of one site without its bias, by the part of their keys that follows the site's path."""
        raise NotImplementedError


FORMATS: dict[type[Method], PeftFormat[Any]] = {}

_F = TypeVar("_F", bound=type[PeftFormat[Any]])


def peft_format(method: type[Method]) -> Callable[[_F], _F]:
    """Class decorator that registers a format for this method, but not for its subclasses."""

    def register(cls: _F) -> _F:
        assert method not in FORMATS, f"two formats are registered for {method.__name__}"
        FORMATS[method] = cls()
        return cls

    return register


def writer_of(method: Method) -> PeftFormat[Any]:
    """The format that writes this method. Raises FormatError if there is none."""
    if type(method) not in FORMATS:
        raise FormatError(f"PEFT has no equivalent of the method {method.name!r}; save with format='reparam'")
    return FORMATS[type(method)]


def reader_of(folder: Folder) -> PeftFormat[Any]:
    """The format that reads this folder, including those of installed plugins. Raises FormatError if there is none."""
    found = _registered_reader(folder)
    if found is None:
        load_installed("reparam.methods")
        found = _registered_reader(folder)
    if found is None:
        peft_type = folder.settings.get("peft_type")
        known = ", ".join(dict.fromkeys(one.peft_type for one in FORMATS.values() if one.peft_type))
        raise FormatError(
            f"{folder.config}: peft_type {peft_type!r} is not supported ({known} are){OTHERS.get(str(peft_type), '')}"
        )
    return found


def _registered_reader(folder: Folder) -> PeftFormat[Any] | None:
    return next((one for one in reversed(FORMATS.values()) if one.reads(folder.settings)), None)
