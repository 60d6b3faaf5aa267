"""Modules that keep the weights of several experts stacked in three-dimensional parameters.

transformers computes with the experts of a model in one module, whose parameters are [E, O, I] or [E, I, O]. Such a
module is opened: it gets a subclass of its class, and a site for each matrix of each expert, below it
(`experts.3.gate_up_proj`). Its parameters stay where they are. Without an active update it computes as before;
otherwise the forward of its class runs with `stacks.Stack` in the place of the parameters. `close_idle` gives modules
back their own class if nothing needs the sites.

Shapes: E experts, O out_features, I in_features.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from reparam.core.placing import hooks_of, patched
from reparam.sites.expert import Expert, Part
from reparam.sites.module import Adapted
from reparam.sites.router import is_router
from reparam.sites.stacks import Stack
from reparam.sites.wrapped import bare
from reparam.weights.dense import DenseWeight, Layout

UNDECORATED: dict[str, Layout] = {
    "InklingSharedExperts": "rows",
    "JetMoeParallelExperts": "rows",
    "Llama4TextExperts": "transposed",
    "LongcatFlashExperts": "rows",
    "Step3p7Experts": "rows",
}
"""Classes of transformers that are modules of experts without its decorator for them, with the layout of a matrix."""
KNOWN = ("eager", "grouped_mm", "batched_mm", None)
"""The ways in which transformers' decorator computes that updates can act on."""


class ExpertSlot(nn.Module):
    """The sites of one expert, as children with the names of the parameters."""


class Opened(nn.Module):
    """What the class of an opened module of experts has beside its own class."""

    stacks: dict[str, Layout]
    """The names of the stacked parameters, and how each keeps a matrix."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module's own class, with the active updates and the quantized weights of its experts."""
        return original_class(self).forward(self if self.is_idle() else self._standing(), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """A stack in the place of a parameter that is quantized."""
        if name in self.__dict__.get("stacks", ()) and name not in self._parameters:
            return self._stack(name)
        return super().__getattr__(name)

    def experts_of(self, name: str) -> list[Expert]:
        """The sites of a stacked parameter, by the number of the expert."""
        children = self._modules  # in each forward of each layer, so without the lookups of nn.Module
        return [children[number]._modules[name] for number in self.__dict__["numbers"]]  # type: ignore[misc, union-attr]

    def is_idle(self) -> bool:
        """Whether the module's own parameters compute its output: no update is active and nothing is quantized."""
        return all(e.active is None and type(e.frozen) is Part for name in self.stacks for e in self.experts_of(name))

    def _standing(self) -> nn.Module:
        """A module of the original class, with the same parameters and children and stacks for the experts' weights."""
        implementation = getattr(getattr(self, "config", None), "_experts_implementation", None)
        if hasattr(self, "is_transposed") and implementation not in KNOWN:
            raise ValueError(
                f"{type(self).__name__}: experts_implementation={implementation!r} computes with the stacked weights "
                f"itself, where adapters and quantized experts have no effect; choose eager, grouped_mm or batched_mm"
            )
        found: nn.Module = object.__new__(original_class(self))
        found.__dict__ = dict(self.__dict__)
        found.__dict__ |= {name: self._stack(name) for name in self.stacks}
        return found

    def _stack(self, name: str) -> Stack:
        return Stack(type(self).__name__, self.experts_of(name), self.stacks[name] == "transposed")


def layout_of(module: nn.Module) -> Layout | None:
    """How a module of experts keeps one matrix; None for any other module.

    The check is by the attributes and names of transformers' classes, because this package imports only torch.
    """
    decorated = hasattr(type(module), "_apply_gate") and "is_transposed" in vars(module)
    if decorated:
        return "transposed" if module.is_transposed else "rows"
    if not type(module).__module__.startswith("transformers."):
        return None
    return UNDECORATED.get(type(module).__name__)


def stacks_of(module: nn.Module) -> dict[str, Layout]:
    """The stacked parameters of a module of experts, with the layout of a matrix; empty for any other module."""
    if isinstance(module, Opened):
        return module.stacks
    layout = layout_of(module)
    own = module._parameters.items() if layout is not None else ()
    return {name: layout for name, p in own if p is not None and p.ndim == 3}  # type: ignore[misc]


def closed_reason(module: nn.Module) -> str | None:
    """Why updates cannot be put on this module of experts; None if they can."""
    if patched(module):
        return "the forward of the module is patched, and an update would be bypassed"
    if any(getattr(hook, "offload", False) for hook in hooks_of(module)):
        return "accelerate offloads the weights of the experts; load the model without offloading"
    if getattr(module, "_is_expert_parallel", False):
        return "the experts are divided among processes (expert parallelism)"
    return None


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Open all modules of experts inside the block; those that nothing needs are closed at its end."""
    found = [module for module in bare(model).modules() if not isinstance(module, Opened) and stacks_of(module)]
    for module in found:
        if closed_reason(module) is None:
            open_experts(module)
    try:
        yield
    finally:
        for module in found:
            settle(module)


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


def open_experts(module: nn.Module) -> None:
    """Make a site for each matrix of each expert, and give the module the class that computes with them."""
    stacks = stacks_of(module)
    parameters = {name: module._parameters[name] for name in stacks}
    count = min(len(p) for p in parameters.values() if p is not None)
    for number in range(count):
        slot = ExpertSlot()
        for name, layout in stacks.items():
            weight = Part(module._parameters, name, number, layout)
            slot._modules[name] = Expert(weight, layout, module.training)
        slot.training = module.training
        module._modules[str(number)] = slot
    module.__dict__ |= {"stacks": stacks, "numbers": tuple(map(str, range(count)))}
    _become(module, _opened_class(type(module)))  # type: ignore[arg-type]


def close_idle(model: nn.Module) -> None:
    """Close the opened modules of experts that no update and no quantized weight needs."""
    for module in list(bare(model).modules()):
        settle(module)


def settle(module: nn.Module) -> None:
    """Keep the weights of an opened module as their storages ask for it, and close the module if nothing needs it.

    The stacked parameter stays if all experts are dense. If they are not, dense experts keep their own matrices.
    """
    if not isinstance(module, Opened):
        return
    for name, layout in module.stacks.items():
        experts = module.experts_of(name)
        dense = [expert for expert in experts if expert.frozen.dense_or_none is not None]
        if len(dense) == len(experts) and not all(expert.stacked for expert in experts):
            whole = nn.Parameter(torch.stack([expert.weight.detach() for expert in experts]), requires_grad=False)
            whole._is_hf_initialized = True  # type: ignore[attr-defined]  # as transformers marks what it loads
            module._parameters[name] = whole
            for number, expert in enumerate(experts):
                expert.hold(Part(module._parameters, name, number, layout))
        elif len(dense) < len(experts):
            for expert in dense:
                if expert.stacked:
                    expert.hold(DenseWeight(expert.frozen.tensor().clone()))
            module._parameters.pop(name, None)
    sites = [expert for name in module.stacks for expert in module.experts_of(name)]
    if all(expert.stacked and not expert.updates for expert in sites):
        for number in module.__dict__.pop("numbers"):
            del module._modules[number]
        del module.__dict__["stacks"]
        _become(module, original_class(module))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module of experts before it was opened."""
    return cast(type[nn.Module], type(module).__mro__[2]) if isinstance(module, Opened) else type(module)


@functools.cache
def _opened_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass with the same name, so that messages and the source of methods are those of the class."""
    return type(cls.__name__, (Opened, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a module; a hook of accelerate, which keeps the forward, gets the new one."""
    module.__class__ = cls
    if "_old_forward" in vars(module):
        module.__dict__["_old_forward"] = cls.forward.__get__(module)
