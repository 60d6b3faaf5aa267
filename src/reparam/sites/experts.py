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
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from reparam.core.placing import hooks_of, patched
from reparam.sites.expert import Choice, Expert, Part
from reparam.sites.layout import groups
from reparam.sites.routing import Routing
from reparam.sites.stacks import Stack
from reparam.sites.walk import walk
from reparam.sites.wrapped import at, bare
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

    routing: Routing | None
    """In a mixed batch: the adapter of each row."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module's own class, with the active updates and the quantized weights of its experts."""
        if self.routing is not None:
            return self._mixed(self.routing, args, kwargs)
        return original_class(self).forward(self if self.is_idle() else self._standing(), *args, **kwargs)

    def _mixed(self, routing: Routing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A mixed batch: each token goes through its experts with its adapter."""
        if torch.is_grad_enabled() and self.training:
            raise ValueError("a mixed batch is for inference: select one adapter to train it, or call model.eval()")
        given = inspect.signature(original_class(self).forward).bind(self, *args, **kwargs).arguments
        given.pop("self")
        blocks = 1 if len(given) > 1 else len(self.__dict__["numbers"])  # Llama 4: all tokens for each expert
        x: Tensor = next(iter(given.values()))
        if blocks > 1:
            x = x.view(blocks, -1, x.shape[-1]).sum(0)
        if routing.trial is not None:
            routing.trial.see(self, x)
            return self._with((None,), given)
        layout = routing.layout(self, x.shape)
        if not all(isinstance(value, Tensor) and len(value) == blocks * len(x) for value in given.values()):
            routing.refuse(x.shape)
        parts = groups(self._choices(routing)[: layout.rows])
        if len(parts) == 1:
            return self._with(tuple(parts), given)
        if is_decorated(self):
            places = torch.empty(layout.rows, dtype=torch.int64, device=x.device)
            for place, rows in enumerate(parts.values()):
                places[rows] = place
            return self._with(tuple(parts), given, places[layout.rows_of_tokens(len(x), x.device)])
        y: list[Tensor] = []
        tokens = [layout.pick(torch.arange(len(x), device=x.device), rows) for rows in parts.values()]
        for choice, own in zip(parts, tokens, strict=True):
            if blocks > 1:
                own = (torch.arange(blocks, device=own.device)[:, None] * len(x) + own).flatten()
            y.append(self._with((choice,), {key: value.index_select(0, own) for key, value in given.items()}))
        if blocks > 1:
            y = [part.view(blocks, -1, part.shape[-1]) for part in y]
            return torch.cat(y, 1).index_select(1, torch.cat(tokens).argsort()).flatten(0, 1)
        return torch.cat(y).index_select(0, torch.cat(tokens).argsort())

    def _choices(self, routing: Routing) -> list[Choice]:
        """The adapter of each row, or its slot if a bank holds it; None for the base and for those without experts."""
        experts = [expert for stack in self.stacks for expert in self.experts_of(stack)]
        names: Sequence[Choice] = routing.names or [None if slot < 0 else slot for slot in routing.slot_list]
        held = {name for name in dict.fromkeys(names) if any(expert.update_of(name) is not None for expert in experts)}
        return [name if name in held else None for name in names]

    def _with(self, choices: tuple[Choice, ...], given: Mapping[str, Any], of_token: Tensor | None = None) -> Any:
        """The output with these adapters. `of_token` [N] tells the place in `choices` of that of each token."""
        if choices == (None,):
            return original_class(self).forward(self if self.is_idle() else self._standing(choices), *given.values())
        standing: Any = self._standing(choices)
        if of_token is not None:
            # Each expert with each adapter is one expert to the module, so that it sorts the tokens by both at once.
            chosen = list(given)[1]
            count, own = len(choices), given[chosen]
            inside = own < standing.num_experts
            number = torch.where(inside, own * count + of_token.unsqueeze(-1), standing.num_experts * count)
            given = {**given, chosen: number}
            for name, bias in self._parameters.items():
                if name.endswith("_bias") and bias is not None:
                    standing.__dict__[name] = bias.detach().repeat_interleave(count, 0)
            standing.num_experts *= count
        return original_class(self).forward(standing, *given.values())

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
        for name in self.stacks:
            for expert in self.experts_of(name):  # by `_modules`, because nn.Module's lookup of attributes is slow
                if expert.active is not None or type(expert._modules["frozen"]) is not Part:
                    return False
        return True

    def _standing(self, choices: tuple[Choice, ...] | None = None) -> nn.Module:
        """A module of the original class, with the same parameters and children and stacks for the experts' weights."""
        implementation = getattr(getattr(self, "config", None), "_experts_implementation", None)
        if hasattr(self, "is_transposed") and implementation not in KNOWN:
            raise ValueError(
                f"{type(self).__name__}: experts_implementation={implementation!r} computes with the stacked weights "
                f"itself, where adapters and quantized experts have no effect; choose eager, grouped_mm or batched_mm"
            )
        found: nn.Module = object.__new__(original_class(self))
        found.__dict__ = dict(self.__dict__)
        found.__dict__ |= {name: self._stack(name, choices) for name in self.stacks}
        return found

    def _stack(self, name: str, choices: tuple[Choice, ...] | None = None) -> Stack:
        return Stack(type(self).__name__, self.experts_of(name), self.stacks[name] == "transposed", choices)


def is_decorated(module: nn.Module) -> bool:
    """Whether transformers' decorator for modules of experts has been applied to the class of this module."""
    return hasattr(type(module), "_apply_gate") and "is_transposed" in vars(module)


def layout_of(module: nn.Module) -> Layout | None:
    """How a module of experts keeps one matrix; None for any other module.

    The check is by the attributes and names of transformers' classes, because this package imports only torch.
    """
    if is_decorated(module):
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
    before = set()
    for module in _modules(model):
        if isinstance(module, Opened):
            before.add(module)
        elif stacks_of(module) and closed_reason(module) is None:
            open_experts(module)
    try:
        yield
    finally:
        for module in _modules(model):
            if module not in before:
                settle(module)


def _modules(model: nn.Module) -> list[nn.Module]:
    """The model and its modules, without those inside sites: the cost does not grow with the adapters."""
    return [bare(model), *(module for _, module in walk(model))]


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
    module.__dict__ |= {"stacks": stacks, "numbers": tuple(map(str, range(count))), "routing": None}
    _become(module, _opened_class(type(module)))  # type: ignore[arg-type]


def make_room(model: nn.Module, stacks: Mapping[str, Sequence[str]]) -> None:
    """Open the modules of these stacks, and give each expert a parameter for the name of its packed matrix in files."""
    for key, paths in stacks.items():
        module = at(model, key.rpartition(".")[0])
        if not isinstance(module, Opened):
            open_experts(module)
        for path in paths:
            expert = at(model, path)
            assert isinstance(expert, Expert)
            expert.await_packed()
        module._parameters.pop(key.rpartition(".")[2])
        module._is_hf_initialized = True  # type: ignore[assignment]  # transformers would initialize the parameter


def close_idle(model: nn.Module) -> None:
    """Close the opened modules of experts that no update and no quantized weight needs."""
    for module in _modules(model):
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
            whole = nn.Parameter(torch.stack([expert.weight for expert in experts]), requires_grad=False)
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
        del module.__dict__["stacks"], module.__dict__["routing"]
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
