"""Where a model has routers, modules of experts and the sites of experts, by path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from reparam.sites.experts import Opened, open_experts, stacks_of
from reparam.sites.module import Adapted
from reparam.sites.router import is_router
from reparam.sites.walk import walk
from reparam.sites.wrapped import at


def routers(modules: Mapping[str, nn.Module]) -> dict[str, None]:
    """The paths of the modules that choose the experts: routers, and linear maps beside E experts with E outputs."""
    found = {path: None for path, module in modules.items() if is_router(_original(module))}
    for path, module in modules.items():
        above, _, name = path.rpartition(".")
        count = len(module.experts_of(next(iter(module.stacks)))) if isinstance(module, Opened) else 0
        if name == "experts" and isinstance(module, nn.ModuleList | nn.ModuleDict):
            count = len(module)
        for other, beside in modules.items() if count else ():
            if other.startswith(f"{above}.") and not other.startswith(f"{path}."):
                rows = beside.frozen.out_features if isinstance(beside, Adapted) else getattr(beside, "out_features", 0)
                if rows >= count and re.search(r"router|gate$|gating|classifier$|wg$", other.removeprefix(above)):
                    found[other] = None
    return {path: None for path in modules if path in found}


def _original(module: nn.Module) -> nn.Module:
    return module.origin[0] if isinstance(module, Adapted) and module.origin else module


def numbers_of_experts(model: nn.Module) -> dict[str, int]:
    """The modules with stacked weights of experts, by path, with the number of experts in each."""
    found: dict[str, int] = {}
    for path, module in walk(model):
        if isinstance(module, Opened):
            found[path] = len(module.__dict__["numbers"])
        elif stacks_of(module):
            found[path] = min(len(module.get_parameter(name)) for name in stacks_of(module))
    return found


def stacked(model: nn.Module, paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The stacked parameters of the experts at these paths, by name in the model, with the paths of the experts."""
    holders = {name for name, module in walk(model) if stacks_of(module)}
    found: dict[str, list[str]] = {}
    for path in paths:
        above, _, name = path.rpartition(".")
        holder = above.rpartition(".")[0]
        if holder in holders:
            found.setdefault(f"{holder}.{name}", []).append(path)
    return {name: tuple(sorted(own, key=lambda path: int(path.split(".")[-2]))) for name, own in found.items()}


def open_at(model: nn.Module, path: str) -> None:
    """Open the module of experts that a site with this path would be in, unless it is open or none is there."""
    parts = path.split(".")
    above = at(model, ".".join(parts[:-2])) if len(parts) > 2 else None
    if above is not None and not isinstance(above, Opened) and parts[-1] in stacks_of(above):
        open_experts(above)


def experts_with(model: nn.Module, path: str) -> Opened | None:
    """The opened module of experts that has the site at this path; None for other sites."""
    parts = path.split(".")
    above = at(model, ".".join(parts[:-2])) if len(parts) > 2 else None
    return above if isinstance(above, Opened) else None
