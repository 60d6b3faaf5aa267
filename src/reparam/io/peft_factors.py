"""Low-rank factors in PEFT's files, shared by the formats of all methods.

The keys are `base_model.model.<path>.lora_A.weight` [R, I] and `.lora_B.weight` [O, R]. An embedding has
`.lora_embedding_A` [R, V], the transpose of our B, and `.lora_embedding_B` [I, R], the transpose of our A.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reparam.core.base import Site
from reparam.core.checks import listed
from reparam.core.method import Method
from reparam.errors import FormatError
from reparam.io.native import FLOATS
from reparam.io.peft_config import Honored
from reparam.io.peft_formats import PREFIX
from reparam.io.record import Base, Record
from reparam.methods.several import NONE

PARTS = {  # end of a key -> (kind of site, our parameter, transposed)
    ".lora_A.weight": ("linear", "A", False),
    ".lora_B.weight": ("linear", "B", False),
    ".lora_embedding_A": ("embedding", "B", True),
    ".lora_embedding_B": ("embedding", "A", True),
}
TOKENS = ".token_adapter.trainable_tokens_delta"
"""End of the key of trained tokens, [n, I]; despite its name, the tensor holds the rows, not their change."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """The tensors of a PEFT weights file, under reparam's names."""

    tensors: dict[str, Tensor]
    kinds: dict[str, str]
    """Kind of each site that has factors, by path."""
    frozen: dict[str, Tensor]
    """Tensors of the base that the file contains, by name."""
    beside: dict[str, Tensor]
    """Trained biases and tokens of modules without factors, by reparam's names."""
    parts: dict[str, dict[str, Any]]
    """The methods of these modules, by path."""
    replaced: list[str]
    """Paths of modules that train whole."""
    problems: list[str]

    def check(self, file: Path) -> None:
        """Raise FormatError that lists all problems, if there are any."""
        if self.problems:
            raise FormatError(f"{file}: {listed(self.problems)}")

    def record(self, method: Method, sites: dict[str, Site], tensors: dict[str, Tensor], config: Honored) -> Record:
        """Build the adapter record with these tensors."""
        base = Base("", config.base_model_name_or_path, {}) if config.base_model_name_or_path else None
        replaced = tuple(self.replaced)
        kept = {"frozen": self.frozen, "beside": self.beside, "parts": self.parts, "claims": config}
        return Record(method, sites, tensors, replaced=replaced, base=base, **kept)  # type: ignore[arg-type]


def sort(raw: Mapping[str, Tensor], config: Honored, more: Mapping[str, str]) -> Contents:
    """Sort the tensors of a PEFT file by their keys.

    `more` maps the key endings of a site's tensors other than factors to reparam's names.
    """
    tensors: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    beside: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Any]] = {}
    kinds: dict[str, str] = {}
    replaced: list[str] = []
    extra: list[tuple[str, str]] = []
    strange: list[str] = []
    names = {**more, ".base_layer.bias": "bias"}
    for key, tensor in raw.items():
        path = key.removeprefix(PREFIX)
        end = next((end for end in (*PARTS, *names) if path.endswith(end)), None)
        if not key.startswith(PREFIX):
            strange.append(key)
        elif end in PARTS:
            kind, parameter, transposed = PARTS[end]
            kinds[path.removesuffix(end)] = kind
            tensors[f"{path.removesuffix(end)}.{parameter}"] = tensor.t() if transposed and tensor.ndim == 2 else tensor
        elif end is not None:
            site = path.removesuffix(end)
            extra.append((site, end))
            tensors[f"{site}.{names[end]}"] = tensor
        elif ".lora_" in path:
            strange.append(key)
        elif ".original_module." in path or path.endswith(".modules_to_save.bias"):
            continue  # with bias="all": the base's own bias of a module that trains whole, and a second copy
        elif module := _saved_module(path, config):
            tensors[path] = tensor
            if module not in replaced:
                replaced.append(module)
        elif config.bias == "all" and path.endswith(".bias"):
            beside[path] = tensor
            parts[path.removesuffix(".bias")] = {"method": NONE}
        elif path.endswith(TOKENS):
            module = path.removesuffix(TOKENS)
            beside[f"{module}.values"] = tensor
            parts[module] = {"method": "tokens", "ids": config.tokens(module)}
        else:  # PEFT's save_embedding_layers: a copy of the base's own matrix
            frozen[path.replace(".token_adapter.", ".").replace(".base_layer.", ".")] = tensor
    if config.ensure_weight_tying:  # PEFT trains the embedding and writes it again under the names of its ties
        trained = [tensors[f"{module}.weight"] for module in replaced if f"{module}.weight" in tensors]
        for path, copy in list(frozen.items()):
            if path.endswith(".weight") and any(torch.equal(copy, one) for one in trained):
                replaced.append(path.removesuffix(".weight"))
                tensors[path] = frozen.pop(path)
    strange += [f"{PREFIX}{site}{end}" for site, end in extra if site not in kinds]
    return Contents(tensors, kinds, frozen, beside, parts, replaced, [f"unknown tensor {key}" for key in strange])


def tensors_of(name: str, site: Site, record: Record, *, inside: str = "") -> dict[str, Tensor]:
    """The factors of one site, by the ends of their PEFT keys. `inside` is the prefix of their names in the record."""
    found = {}
    for end, (kind, parameter, transposed) in PARTS.items():
        if kind == site.kind or (kind == "linear" and site.kind == "router"):
            tensor = record.tensors[f"{name}.{inside}{parameter}"]
            found[end] = tensor.t() if transposed else tensor
    return found


def _saved_module(path: str, config: Honored) -> str | None:
    """The path of the outermost module that contains this tensor and trains whole, or None."""
    parts = path.split(".")
    return next((m for i in range(1, len(parts)) if config.whole(m := ".".join(parts[:i]))), None)


def sites_of(contents: Contents, file: Path, *, least: int = 1) -> dict[str, Site]:
    """The sites of the factors, by path. `least` is the lowest allowed rank.

    Raises FormatError if a factor is missing, or if the shapes or dtypes of two factors do not match.
    """
    tensors, kinds = contents.tensors, contents.kinds
    if not kinds:
        raise FormatError(f"{file}: holds no LoRA factors")
    keys = {(kind, parameter): end for end, (kind, parameter, _) in PARTS.items()}
    problems = [
        f"missing {PREFIX}{name}{keys[kind, parameter]}"
        for name, kind in kinds.items()
        for parameter in ("A", "B")
        if kind != "expert"
        if f"{name}.{parameter}" not in tensors
    ]
    sites = {}
    for name, kind in kinds.items() if not problems else ():
        a, b = tensors[f"{name}.A"], tensors[f"{name}.B"]
        if a.ndim == b.ndim > 2:
            problems.append(
                f"{PREFIX}{name}: factors of a convolution, lora_A {list(a.shape)}, which is not supported; train the "
                f"module whole instead (modules_to_save)"
            )
        elif a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (a.shape[1], len(b)) or len(a) < least:
            problems.append(
                f"{PREFIX}{name}: the shapes of lora_A {list(a.shape)} and lora_B {list(b.shape)} do not match"
            )
        elif a.dtype not in FLOATS or b.dtype not in FLOATS:
            problems.append(f"{PREFIX}{name}: expected floating-point factors, found {a.dtype} and {b.dtype}")
        else:
            sites[name] = Site(name, kind, b.shape[0], a.shape[1])
    if problems:
        raise FormatError(f"{file}: {listed(problems)}")
    return sites


def targets_of(record: Record) -> list[str] | str:
    """The `target_modules` that PEFT expands to exactly the sites: path ends, whole paths, or a regular expression."""
    ends = sorted({name.rpartition(".")[2] for name in record.sites})
    for names in (ends, list(record.sites)) if record.modules else (list(record.sites),):
        found = {m for m in (*record.modules, *record.sites) if any(m == n or m.endswith("." + n) for n in names)}
        if found == record.sites.keys():
            return names
    return "|".join(re.escape(name) for name in record.sites)


def replaced_of(record: Record) -> list[str] | None:
    """The `modules_to_save` of the configuration, or None.

    PEFT trains every module whose path ends with one of the names. Raises FormatError if a name would match a module
    that the adapter does not train.
    """
    for name in record.replaced:
        others = [m for m in record.modules if m.endswith(name) and m not in record.replaced]
        if others:
            raise FormatError(
                f"PEFT matches modules_to_save by the ends of paths, so {name!r} would also match {others[0]}; save "
                f"with format='reparam'"
            )
    return list(record.replaced) or None
