"""The section [base] of the configuration: the frozen model and the storage of its matrices.

The section holds the keys of `BaseConfig` and the settings of the chosen storage, so that a new storage needs no change
in this file.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import reparam.weights  # noqa: F401  (registers the storages)
from reparam.core.base import Storage
from reparam.core.checks import nearest
from reparam.core.plain import wrong_types
from reparam.core.registry import STORAGES, find_storage
from reparam.errors import ConfigError
from reparam.hf.folder import is_gguf


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The frozen model."""

    path: str = ""
    """Folder or hub id of the base model, or a GGUF file."""
    gguf: str | None = None
    """Name of a GGUF file in base.path, a folder or a hub id. Its weights are dequantized."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the base's weights: float32, bfloat16, float16, or auto (as in its files). Adapters always train in
    float32."""
    revision: str | None = None
    """Branch, tag or commit of the base model on the hub."""
    untie: bool = False
    """Give each module that shares a weight its own copy, such as a tied output head, to adapt each separately."""
    storage: str = "dense"
    """Storage of the frozen matrices. All but dense quantize them while the model is read; QLoRA uses nf4."""
    quantized: tuple[str, ...] = ("all-linear",)
    """Matrices to quantize, written like adapter.targets. The default leaves out the embeddings and the output head."""

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """The settings of the storage; each is a key of [base] in files and options."""

    def __post_init__(self) -> None:
        if problems := wrong_types(self):
            raise ConfigError("; ".join(f"base.{problem}" for problem in problems))
        if self.gguf is not None:
            if is_gguf(self.path) or not is_gguf(self.gguf) or not self.path:
                raise ConfigError(
                    f"base.gguf: {self.gguf!r}: expected the name of a .gguf file in base.path, a folder or a hub id"
                )
            object.__setattr__(self, "path", f"{self.path.rstrip('/')}/{self.gguf}")
            object.__setattr__(self, "gguf", None)
        cls = find_storage(self.storage)
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [key for key in self.settings if key not in known]:
            raise ConfigError(
                f"base.settings: {self.storage} has no setting {unknown[0]!r}{nearest(unknown[0], known)}"
            )
        object.__setattr__(self, "settings", cls(**self.settings).settings())

    def quantization(self) -> Storage | None:
        """The storage with its settings; None for dense. Raises ValueError for an unknown storage or setting."""
        return find_storage(self.storage)(**self.settings) if self.storage != "dense" else None

    def table(self) -> dict[str, Any]:
        """The section as a flat table for files: the keys of `BaseConfig` and the settings of the storage."""
        own = dataclasses.asdict(self)
        return own | own.pop("settings")


KEYS = tuple(field.name for field in dataclasses.fields(BaseConfig) if field.name != "settings")
"""The keys of [base] that do not depend on the storage."""


def split_keys(table: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split [base] into the keys of `BaseConfig` and the settings of the chosen storage; append errors to `problems`.

    A setting of another storage is ignored if it has its default value.
    """
    if "packed" in table:
        warnings.warn("base.packed is now base.quantized; the next release removes the old name", FutureWarning, 2)
        table = {"quantized" if key == "packed" else key: value for key, value in table.items()}
    common = {key: value for key, value in table.items() if key in KEYS}
    settings = {}
    name = str(table.get("storage", "dense"))
    try:
        known = [field.name for field in dataclasses.fields(find_storage(name))]
    except ValueError as error:
        problems.append(f"base.storage: {error}")
        del common["storage"]
        known = [field.name for cls in STORAGES.values() for field in dataclasses.fields(cls)]
    for key in table.keys() - KEYS:
        owners = {
            name: field for name, cls in STORAGES.items() for field in dataclasses.fields(cls) if field.name == key
        }
        if key in known:
            settings[key] = table[key]
        elif not owners:
            problems.append(f"unknown key base.{key}{nearest(key, [*KEYS, *known])}")
        elif all(str(table[key]).lower() != str(field.default).lower() for field in owners.values()):
            problems.append(
                f"base.{key} is a setting of the storage {' and '.join(owners)}, and base.storage is {name}: leave it "
                f"out, or choose another base.storage"
            )
    return common, settings
