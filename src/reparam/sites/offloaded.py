"""What adapters cannot do on modules whose weights accelerate offloads (see `core/placing.py`)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from reparam.core.checks import listed
from reparam.core.placing import hooks_of, offload_of
from reparam.sites.walk import walk
from reparam.sites.wrapped import at, bare


def offloads(module: nn.Module) -> bool:
    """Whether a hook keeps weights of this module, or of one in it, elsewhere between calls."""
    return any(offload_of(part) is not None for part in module.modules())


def beneath_offload(model: nn.Module) -> dict[str, str]:
    """The modules whose weights can be offloaded in no site, by path, with the reason.

    A hook that places the weights of a whole block would take an adapter's parameters for the model's own. Which
    offloaded weights are tied cannot be seen, because each has its own empty parameter; transformers' list says it.
    """
    found: dict[str, str] = {}
    modules = [("", bare(model)), *walk(model)]
    for path, module in modules:
        if any(getattr(hook, "offload", False) and hook.place_submodules for hook in hooks_of(module)):
            why = (
                f"accelerate's hook on {path or 'the model'} offloads the weights of all modules in it together, where "
                f"an adapter has no weights; load the model without it"
            )
            found |= {name: why for name, _ in modules if name and f"{name}.".startswith(f"{path}." if path else "")}
    linked: dict[str, str] = getattr(bare(model), "all_tied_weights_keys", None) or {}
    names = {key.rpartition(".")[0] for pair in linked.items() for key in pair}
    tied = {name: module for name, module in modules if name in names and offload_of(module) is not None}
    why = "its weight is tied and accelerate offloads it; load the model without offloading"
    return dict.fromkeys(tied, why) | found


def check_placed(model: nn.Module, paths: Iterable[str], what: str) -> None:
    """Raise ValueError if one of these modules is offloaded: a new weight would be lost."""
    gone = [path for path in paths if offload_of(at(model, path)) is not None]
    if gone:
        raise ValueError(
            f"{what}: accelerate offloads the weights of {listed(gone, shown=3)}, and the new ones would be lost; load "
            f"the model without offloading"
        )
