"""Iterate over the modules and parameters of a model, with or without adapters, by path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from reparam.core.base import Storage
from reparam.sites.module import Adapted, Shared, is_quantized
from reparam.sites.replaced import Replaced
from reparam.sites.wrapped import at, bare


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by path, except those inside sites or `Replaced`: the cost does not grow with the adapters."""
    model = bare(model)
    yield from _below(model, "", {model})


def _below(parent: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in parent.named_children():
        module = bare(child)
        if module not in seen and not isinstance(module, Shared):
            seen.add(module)
            yield path + name, module
            if not isinstance(module, Adapted | Replaced):
                yield from _below(module, f"{path}{name}.", seen)


def other_paths(model: nn.Module) -> dict[str, str]:
    """The further paths of modules that are at several, each with the path that `walk` gives."""
    first = {module: path for path, module in walk(model)}
    found: dict[str, str] = {}
    model = bare(model)
    places = [(name, child, {model}) for name, child in model._modules.items()]
    while places:
        path, child, above = places.pop()
        module = None if child is None else bare(child)
        if module is None or module not in first or module in above:
            continue
        if first[module] != path:
            found[path] = first[module]
        if not isinstance(module, Adapted | Replaced):
            places += [(f"{path}.{name}", child, above | {module}) for name, child in module._modules.items()]
    return found


def tied(model: nn.Module, names: Iterable[str], *, bias: bool = True) -> dict[str, list[str]]:
    """For each of the modules `names` that shares a parameter with modules outside it: the paths of those modules.

    With `bias=False`, parameters with the name "bias" do not count.
    """
    holders: dict[int, list[str]] = {}
    for path, name, parameter in _parameters_below(model, "", set()):
        if bias or name != "bias":
            holders.setdefault(id(parameter), []).append(path)
    shared = [paths for paths in holders.values() if len(paths) > 1]
    found: dict[str, list[str]] = {}
    for name in names if shared else ():
        for paths in shared:
            outside = [path for path in paths if path != name and not path.startswith(name + ".")]
            if outside and len(outside) < len(paths):
                found.setdefault(name, []).extend(outside)
    return found


def same_weight(model: nn.Module) -> list[list[str]]:
    """The groups of modules that share their parameter `weight`: the paths of each, in the model's order."""
    groups: dict[int, list[str]] = {}
    for path, name, parameter in _parameters_below(model, "", set()):
        if name == "weight":
            groups.setdefault(id(parameter), []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base model's parameters, each with the path of the module that holds it.

    A parameter that several modules share is listed once for each of them. A module at several paths is listed once,
    under the first.
    """
    for path, _, parameter in _parameters_below(model, "", set()):
        yield path, parameter


def _parameters_below(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, str, nn.Parameter]]:
    module = bare(module)
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, Replaced):
        yield from _parameters_below(module.origin, path, seen)
        return
    own = [*module.named_parameters(recurse=False)]
    if is_quantized(module):
        own += module.frozen.named_parameters()
    for name, parameter in own:
        yield path, name, parameter
    for name, child in () if isinstance(module, Adapted) else module._modules.items():
        if child is not None and not isinstance(child, Shared):
            yield from _parameters_below(child, f"{path}.{name}".lstrip("."), seen)


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put these modules into the model: at their paths, and at all other paths of the modules that were there.

    A wrapper of a module that is replaced (see `wrapped.py`) is replaced with it, because it calls what it has got.
    """
    model = bare(model)
    there = {path: at(model, path) for path in modules}
    new = {old: modules[path] for path, old in there.items() if old is not modules[path]}
    parents = [model, *(module for _, module in walk(model))] if new else []
    for parent in parents:
        if not isinstance(parent, Adapted | Replaced):
            for name, child in list(parent._modules.items()):
                if child is not None and bare(child) in new:
                    setattr(parent, name, new[bare(child)])


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
