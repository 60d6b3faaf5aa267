"""Attach adapters to a model, and remove them."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import reparam.methods
import reparam.weights  # noqa: F401  (importing both packages registers the methods and storages)
from reparam.adapter.adapter import Adapter, saved
from reparam.adapter.experts import assemble
from reparam.adapter.quantize import describe
from reparam.adapter.replacing import check_whole, copies_of
from reparam.adapter.selection import AdapterState, select, state_of
from reparam.adapter.tie import check_ties, together, whole_together
from reparam.core.base import Update
from reparam.core.checks import listed, nearest
from reparam.core.method import Method
from reparam.core.registry import find_method
from reparam.sites import targets as targets_
from reparam.sites.experts import close_idle, opened
from reparam.sites.follower import Follower
from reparam.sites.module import SHARED, Adapted, Shared
from reparam.sites.parts import WORDS, without_vision
from reparam.sites.reads import announce
from reparam.sites.replaced import Replaced
from reparam.sites.walk import newly_initialized, put, walk
from reparam.sites.wrapped import at, bare, check_trainable


def attach(
    model: nn.Module,
    method: str | Method,
    *,
    targets: targets_.Targets | None = None,
    name: str = "default",
    bias: bool = False,
    modules_to_save: Iterable[str] = (),
    tie: bool = False,
    **settings: Any,
) -> Adapter:
    """Put a new adapter on `model`, select it, and freeze all other parameters. The model's outputs do not change.

    Args:
        model: the base model, with or without other adapters.
        method: a configuration such as `LoRA(r=8)`, or the name of a method followed by its `settings`: `"lora", r=8`.
        targets: the modules to adapt: "all-linear" (without the output head), "attention", "mlp", "everything"
            (including the head, embeddings and norms), the last components of a path, "re:" followed by a regular
            expression for the path, or a list of these. The default depends on the method; for most it is "all-linear".
            A mixture of saved adapters (`method.experts`) goes on those target modules that the adapters change.
        name: the adapter's name: letters, digits, "_" and "-".
        bias: whether the biases of the adapted modules train too. This is always the argument of `attach`, so pass
            a method's own `bias` in a configuration: `Intrinsic(bias=False)`.
        modules_to_save: the last components of the paths of modules that train whole and are saved with the adapter,
            such as a newly initialized head.
        tie: let one update act on all modules that share a weight with a targeted one, such as the embedding and the
            output head: W' = W + s·B·A in both (PEFT: `ensure_weight_tying`). The weights stay tied, also when merged.
            The methods lora, dora, adalora and full can do this. A module in `modules_to_save` gets one trained weight
            for all places. `reparam.untie` lets you adapt each alone instead.
        settings: settings of the method, if `method` is a name.

    Raises ValueError, before the model is changed, if the targets match nothing or a module that the method cannot
    adapt, if the name is invalid or taken, if weights are tied, if the method or a setting is unknown, or if `settings`
    are passed with a configuration.

    >>> from torch import nn
    >>> from reparam import LoRA
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> attach(model, LoRA(r=2), targets=["0"], name="task")
    Adapter('task', lora, 1 site, 16 parameters)
    >>> attach(model, "lora", r=2, targets=["2"], name="other")
    Adapter('other', lora, 1 site, 12 parameters)
    """
    check_trainable(model)
    model = bare(model)
    method = _configured(method, settings)
    with opened(model):
        wanted = [targets] if isinstance(targets, str) else list(method.default_targets if targets is None else targets)
        found = targets_.resolve(model, wanted, tie=tie)
        found = without_vision(model, found) if targets is None else found
        names = _reached(model, method, wanted, found)
        ends = [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save
        whole = [path for end in ends for path in targets_.ending(model, end)]
        whole, linked = whole_together(model, whole) if tie else (whole, {})
        # As in PEFT, modules that train whole get no update.
        names = [n for n in names if not any(n == w or n.startswith(w + ".") for w in whole)]
        names, leaders = together(model, method, names, warns=not linked) if tie else (names, {})
        method, experts = assemble(model, method, names)
        names = [n for n in names if f"{n}.A" in experts] if experts else names
        bias = bias or method.biases
        ties = leaders | linked
        adapter = install(model, method, names=names, replaced=whole, name=name, bias=bias, tied=ties, warns=True)
        tensors = adapter.tensors()
        for key, value in experts.items():
            tensors[key].copy_(value)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        adapter.requires_grad_()
        select(model, name)
        new = [
            path for path in newly_initialized(model) if not f"{path}.".startswith(tuple(f"{end}." for end in whole))
        ]
        if new:
            warnings.warn(
                f"{listed(new)}: not in the files of the model, so transformers initialized the parameters randomly; "
                f"they stay frozen. To train such a module with the adapter, pass its name in modules_to_save",
                stacklevel=2,
            )
        return adapter


def _configured(method: str | Method, settings: Mapping[str, Any]) -> Method:
    """Return the configuration itself, or build the one that the name and the settings describe."""
    own = ("targets", "name", "bias", "modules_to_save", "tie")
    if not isinstance(method, str | Method):
        name = method.__name__ if isinstance(method, type) else "LoRA"
        raise ValueError(
            f"attach: method={method!r}: expected a configuration such as {name}() or a name such as 'lora'"
        )
    if not isinstance(method, str):
        if not settings:
            return method
        first = next(iter(settings))
        raise ValueError(
            f"attach: unexpected argument {first}={settings[first]!r}{nearest(first, own)}; pass a setting of the "
            f"method in its configuration: {type(method).__name__}({first}=...)"
        )
    cls = find_method(method)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    unknown = [f"{key!r}{nearest(key, [*known, *own])}" for key in settings if key not in known]
    if unknown:
        raise ValueError(f"attach: {method} has no setting {', '.join(unknown)}; its settings are {', '.join(known)}")
    return cls(**settings)


def _reached(model: nn.Module, method: Method, wanted: Sequence[str], found: list[str]) -> list[str]:
    """The sites among `found` that the method supports.

    Raises ValueError if a path in `wanted` names an unsupported site, or if no site is supported.
    """
    modules = dict(walk(model))
    odd = {name: why for name in found if (why := method.unsupported_reason(targets_.site_of(name, modules[name])))}
    paths = [target for target in wanted if target not in (*targets_.KEYWORDS, *WORDS)]
    named = [name for name in targets_.resolve(model, paths) if name in odd] if odd and paths else []
    if named or len(odd) == len(found):
        reasons: dict[str, list[str]] = {}
        for name in named or found:
            reasons.setdefault(odd[name], []).append(name)
        problems = [f"{listed(names, shown=3)}: {why}" for why, names in reasons.items()]
        raise ValueError(f"{method.name} cannot go on {'; '.join(problems)}")
    return [name for name in found if name not in odd]


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on the model, by name; empty if there are none."""
    return dict(state_of(model).adapters) if hasattr(bare(model), "reparam_state") else {}


def remove(model: nn.Module, name: str) -> None:
    """Remove an adapter from the model. Removing the last one also restores the model's original modules.

    Raises ValueError if no adapter has this name.
    """
    model = bare(model)
    state = state_of(model)
    state.check(name)
    state.forget(name)
    if not state.adapters:
        unwrap(model)


def unwrap(model: nn.Module) -> None:
    """Drop all adapters and restore the model's original modules, with the current values of the frozen weights."""
    model = bare(model)
    state = state_of(model)
    state.select(None)
    found = dict(walk(model))
    sites = {path: module.restore() for path, module in found.items() if isinstance(module, Adapted)}
    put(model, sites | {path: module.origin for path, module in found.items() if isinstance(module, Replaced)})
    close_idle(model)
    if hasattr(model, SHARED):
        delattr(model, SHARED)
    for encoder in state.unnested:
        encoder.use_nested_tensor = True
    state.leave()
    describe(model)


def check_name(model: nn.Module, name: str) -> None:
    """Raise ValueError if a new adapter on `model` cannot have this name: invalid characters, reserved, or taken."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"name={name!r}: expected letters, digits, '_' and '-'")
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise ValueError(f"name={name!r} is an attribute of PyTorch's ModuleDict or ParameterDict; choose another name")
    if name in adapters(model):
        raise ValueError(f"name={name!r} is taken; remove(model, {name!r}) first, or choose another name")


def install(
    model: nn.Module,
    method: Method,
    *,
    names: list[str],
    replaced: list[str],
    name: str,
    bias: bool,
    tied: Mapping[str, str] = MappingProxyType({}),
    check: Callable[[dict[str, Tensor]], None] | None = None,
    warns: bool = False,
) -> Adapter:
    """Build all updates and then put them into the model. If building fails or `check` raises, the model is unchanged.

    `tied` gives, for modules that share a weight, the path of the one whose update, or trained copy, they use.
    `check` receives the tensors that `save` will write, by their names in the file. If `warns` is true, the adapter
    is a new one: the method's notes become warnings, which point at the line that called `attach`, and settings without
    effect are refused. A loaded adapter needs no notes, and may have such settings.
    """
    check_name(model, name)
    linked = {path: leader for path, leader in tied.items() if path in replaced}
    tied = {path: leader for path, leader in tied.items() if path not in linked}
    check_ties(model, names, tied, bias=bias or not method.ties)
    check_whole(model, names, replaced, linked)
    fresh = [path for path in names if not isinstance(at(model, path), Adapted)]
    trains = {path: bool(at(model, path).weight.requires_grad) for path in fresh}
    modules: dict[str, Adapted] = {}
    try:
        for path in names:
            modules[path] = targets_.wrap(at(model, path))
        sites = {path: module.site(path) for path, module in modules.items() if path not in tied}
        method.check(list(sites.values()))
        idle = method.idle_settings()
        if idle and warns:
            raise ValueError("; ".join(idle))
        for note in idle:
            warnings.warn(note, stacklevel=4)
        for note in method.notes(list(sites.values())) if warns else ():
            warnings.warn(note, stacklevel=3)
        shared = method.shared(list(sites.values()))
        if shared is not None:
            shared.to(modules[names[0]].frozen.device)
        own = {path: method.build(site, modules[path].frozen, shared) for path, site in sites.items()}
        updates: dict[str, Update] = own | {path: Follower(own[leader]) for path, leader in tied.items()}
        holders = {path: h if isinstance(h := at(model, path), Replaced) else Replaced(h) for path in replaced}
        copies = copies_of(holders, linked)
        for path in names:
            _check_form(path, updates[path], modules[path])
        if check is not None:
            biases = {p: m.bias for p, m in modules.items() if bias and m.bias is not None}
            check(saved(updates, biases, copies, shared))
    except BaseException:
        for path in trains.keys() & modules.keys():  # wrapping froze these weights and transposed those of Conv1D
            modules[path].restore().get_parameter("weight").requires_grad_(trains[path])
        raise

    adapter = Adapter(name, method, model)
    adapter.sites, adapter.modules, adapter.replaced, adapter.shared = sites, modules, holders, shared
    adapter.tied = dict(tied)
    for path, module in modules.items():
        module.add(name, updates[path].train(module.training), bias=bias)
    for path, holder in holders.items():
        holder.updates[name] = copies[path]
    put(model, {**modules, **holders})
    if shared is not None:
        if not hasattr(model, SHARED):
            model.add_module(SHARED, Shared())
        getattr(model, SHARED)[name] = shared
    adapter.controller = method.controller(adapter.updates)
    if not hasattr(model, "reparam_state"):
        AdapterState(model).join()
    state_of(model).adopt(adapter)
    for path, module in modules.items():
        state_of(model).unnested += announce(model, path, module)
    return adapter


@torch.no_grad()
def _check_form(path: str, update: Update, module: Adapted) -> None:
    """Check that the module can compute with the update.

    Raises InputDependentError if the update lacks the form that the module needs, such as `rows` for an embedding, and
    ValueError if the update changes the bias of a module that cannot have one.
    """
    module.check_update(update)
    if module.bias is None and not module.can_add_bias and update.bias_delta() is not None:
        raise ValueError(f"{path}: the update changes the bias, but this {module.kind} module cannot have a bias")
