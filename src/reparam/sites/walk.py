"""Iterate over the modules and parameters of a model, with or without adapters, by path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from reparam.core.base import Storage
from reparam.sites.module import Adapted, Shared, is_quantized
from reparam.sites.replaced import Replaced


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by path, except those inside sites or `Replaced`: the cost does not grow with the adapters."""
    yield from _below(model, "", {model})


def _below(parent: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in parent.named_children():
        if module not in seen and not isinstance(module, Shared):
            seen.add(module)
            yield path + name, module
            if not isinstance(module, Adapted | Replaced):
                yield from _below(module, f"{path}{name}.", seen)


def tied(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """For each of the modules `names` that shares a parameter with modules outside it: the paths of those modules."""
    holders: dict[int, list[str]] = {}
    for path, parameter in base_parameters(model):
        holders.setdefault(id(parameter), []).append(path)
    shared = [paths for paths in holders.values() if len(paths) > 1]
    found: dict[str, list[str]] = {}
    for name in names if shared else ():
        for paths in shared:
            outside = [path for path in paths if path != name and not path.startswith(name + ".")]
            if outside and len(outside) < len(paths):
                found.setdefault(name, []).extend(outside)
    return found


def base_parameters(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """The base model's parameters; a shared parameter is listed once for each module that holds it."""
    if isinstance(module, Replaced):
        yield from base_parameters(module.origin, path)
        return
    own = [*module.parameters(recurse=False)]
    if is_quantized(module):
        own += module.frozen.parameters()
    for parameter in own:
        yield path, parameter
    for name, child in () if isinstance(module, Adapted) else module._modules.items():
        if child is not None and not isinstance(child, Shared):
            yield from base_parameters(child, f"{path}.{name}".lstrip("."))


def newly_initialized(model: nn.Module) -> list[str]:
    """Paths of modules with parameters that transformers initialized, because the model's files do not have them.

    transformers marks the parameters that it loads. Empty for a model that it did not load.
    """
    quantized = storages_in(model)
    marked = [
        (path, getattr(parameter, "_is_hf_initialized", False))
        for path, parameter in base_parameters(model)
        if path not in quantized
    ]
    return list(dict.fromkeys(path for path, loaded in marked if not loaded)) if any(m for _, m in marked) else []


def storages_in(model: nn.Module) -> dict[str, Storage]:
    """The storage of each quantized matrix, by module path."""
    return {path: module.frozen.storage for path, module in walk(model) if is_quantized(module)}
