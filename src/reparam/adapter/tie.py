"""Find the modules that share a weight with the sites of an adapter, for one update that acts on all of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from reparam.core.method import Method
from reparam.core.registry import METHODS
from reparam.core.surface import advice
from reparam.sites import targets as targets_
from reparam.sites.walk import same_weight, tied, walk
from reparam.sites.wrapped import at


def whole_together(model: nn.Module, whole: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Add the modules that share their weight with one of `whole`, the modules that train whole.

    Also returns, for each module whose copy has the trained weight of another copy, the path of that one.
    """
    groups = [group for group in same_weight(model) if set(group) & set(whole)]
    leaders = {path: group[0] for group in groups for path in group[1:]}
    return list(dict.fromkeys([*whole, *(path for group in groups for path in group)])), leaders


def copies_together(model: nn.Module, tensors: Mapping[str, Tensor], replaced: Sequence[str]) -> dict[str, str]:
    """The same for the copies in a file: they have one weight if they were saved with equal values."""
    _, leaders = whole_together(model, replaced)
    pairs = {path: (tensors.get(f"{path}.weight"), tensors.get(f"{to}.weight")) for path, to in leaders.items()}
    return {p: leaders[p] for p, (a, b) in pairs.items() if a is not None and b is not None and torch.equal(a, b)}


def together(
    model: nn.Module, method: Method, names: Sequence[str], *, warns: bool = True
) -> tuple[list[str], dict[str, str]]:
    """Add the modules that share a weight with one of `names`, in the model's order.

    Also returns, for each module that uses the update of another one, the path of that one: an embedding, if the group
    has one, because its kind of initialization fits both uses.

    Raises ValueError if one of them cannot be adapted, or if the method cannot do this. Warns if none shares a weight,
    unless `warns` is False.
    """
    groups = [group for group in same_weight(model) if set(group) & set(names)]
    if not groups:
        if warns:
            warnings.warn(
                "tie has no effect: none of the modules that the targets name shares its weight with another one",
                stacklevel=3,
            )
        return list(names), {}
    if not method.ties:
        known = ", ".join(name for name, cls in METHODS.items() if cls.ties)
        remedy = advice("call reparam.untie(model)", "pass --base.untie")
        raise ValueError(
            f"tie: {method.name} cannot act on several modules with one update; use one of {known}, or {remedy}"
        )
    modules = dict(walk(model))
    odd = targets_.unsupported(model, modules)
    leaders: dict[str, str] = {}
    for group in groups:
        for path in group:
            why = odd.get(path) or method.unsupported_reason(targets_.site_of(path, modules[path]))
            if why:
                others = ", ".join(other for other in group if other != path)
                raise ValueError(f"tie: {path} shares its weight with {others}, and no update can be on it: {why}")
        kinds = {path: targets_.site_of(path, modules[path]).kind for path in group}
        leader = next((path for path in group if kinds[path] == "embedding"), group[0])
        leaders |= {path: leader for path in group if path != leader}
    wanted = {*names, *(path for group in groups for path in group)}
    return [path for path in modules if path in wanted], leaders


def check_ties(model: nn.Module, names: Sequence[str], leaders: Mapping[str, str], *, bias: bool) -> None:
    """Raise ValueError if an update at one of these sites would change a module that does not use the update.

    `leaders` gives the site whose update a module uses; `bias` tells whether biases change too.
    """
    for path, others in tied(model, names, bias=bias).items():
        own = leaders.get(path, path)
        left = [other for other in others if other not in names or leaders.get(other, other) != own]
        if left:
            untie = advice("call reparam.untie(model) first", "pass --base.untie")
            tie = advice("attach with tie=True", "pass --adapter.tie")
            raise ValueError(
                f"{path} shares its weight with {', '.join(left)}, so changing one would change the other; {untie} to "
                f"give each its own copy, {tie} to let one update act on all of them, or leave {path} out of the "
                f"targets"
            )
    for path, leader in leaders.items():
        sizes = [targets_.sizes(at(model, name))[1:] for name in (path, leader)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{path} cannot use the update of {leader}: their weights are {sizes[0]} and {sizes[1]}")
