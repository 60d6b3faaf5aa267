"""Modules that an adapter trains whole: which can be, and the copies that train."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from reparam.core.surface import advice
from reparam.sites import targets
from reparam.sites.experts import settle
from reparam.sites.module import Adapted, is_quantized
from reparam.sites.replaced import Replaced
from reparam.sites.walk import tied
from reparam.sites.wrapped import at


def copies_of(holders: Mapping[str, Replaced], linked: Mapping[str, str]) -> dict[str, nn.Module]:
    """A new copy of each module, by path. Those that are `linked` get the weight of the copy that they are linked to.

    A copy shares the hooks of accelerate in the module, which can hold weights of other modules.
    """
    found = {}
    for path, holder in holders.items():
        hooks = [hook for part in holder.origin.modules() if (hook := vars(part).get("_hf_hook")) is not None]
        found[path] = copy.deepcopy(holder.origin, {id(hook): hook for hook in hooks})
        for part in list(found[path].modules()):
            settle(part)
    for path, leader in linked.items():
        found[path]._parameters["weight"] = found[leader]._parameters["weight"]
    return found


def check_whole(model: nn.Module, names: list[str], replaced: list[str], linked: Mapping[str, str]) -> None:
    """Raise ValueError if a module cannot be trained whole: it is tied, or contains a site of an adapter.

    Modules that are `linked`, each to the one whose trained weight it has, may be tied to each other.
    """
    for path, others in tied(model, replaced).items():
        if all(linked.get(other, other) == linked.get(path, path) for other in others):
            continue
        remedy = advice(
            "call reparam.untie(model) first, attach with tie=True to train one weight for all of them",
            "pass --base.untie, or --adapter.tie to train one weight for all of them",
        )
        raise ValueError(
            f"{path} shares its weight with {', '.join(others)}, so changing one would change the other; {remedy}, or "
            f"leave {path} out of modules_to_save"
        )
    for path in replaced:
        module = at(model, path)
        why = targets.unsupported_whole(module)
        if why:
            raise ValueError(f"{path} cannot be trained whole: {why}; name those of its submodules that can")
        inside = () if isinstance(module, Replaced) else module.named_modules()
        taken = [f"{path}.{name}".rstrip(".") for name, part in inside if _is_taken(part)]
        taken += [n for n in (*names, *replaced) if n.startswith(f"{path}.") or (n == path and n in names)]
        if taken:
            raise ValueError(
                f"{path} cannot be trained whole, because an adapter already changes {taken[0]}; remove that first"
            )


def _is_taken(module: nn.Module) -> bool:
    """Whether an adapter or a quantized weight needs this module. An expert's site may be without both."""
    if isinstance(module, Adapted):
        return bool(module.updates) or is_quantized(module)
    return isinstance(module, Replaced)
