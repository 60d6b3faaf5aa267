"""Adapters on a model: attach, select, remove."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import reparam.methods
import reparam.weights  # noqa: F401  (both fill their registries)
from reparam.adapter.adapter import Adapter, saved
from reparam.adapter.experts import assemble
from reparam.adapter.quantize import describe
from reparam.adapter.selection import AdapterState, Selection, state_of
from reparam.core.base import Update
from reparam.core.checks import listed, nearest
from reparam.core.method import Method
from reparam.core.registry import find_method
from reparam.sites import targets as targets_
from reparam.sites.module import SHARED, Adapted, Replaced, Shared
from reparam.sites.walk import tied, walk


def attach(
    model: nn.Module,
    method: str | Method,
    *,
    targets: targets_.Targets | None = None,
    name: str = "default",
    bias: bool = False,
    modules_to_save: Iterable[str] = (),
    **settings: Any,
) -> Adapter:
    """Put a fresh adapter on `model`, select it, and freeze everything else.

    `method` is a configuration, or the name of a method, whose `settings` then follow: `LoRA(r=8)` or `"lora", r=8`.
    A `bias` is always that of `attach`; give `Intrinsic(bias=False)` as a configuration.

    `targets` is "all-linear" (without the output head), "attention", "mlp", "everything" (with the head, embeddings and
    norms), the end of a path or a list of such, or "re:" and a regular expression for the path; by default what is
    usual for the method, "all-linear" for most. With `bias`, the biases of the sites train too. `modules_to_save` are
    ends of paths of modules that train whole and are saved with the adapter, a fresh head for instance. A mixture of
    finished adapters (`method.experts`) goes on their sites, of those that the targets name.

    The outputs do not change. Raises ValueError, before anything is touched, for targets that match nothing or what
    cannot be adapted, for a name that is taken or not made of letters, digits, "_" and "-", for tied weights, for an
    unknown method or setting, and for settings beside a configuration.

    >>> from torch import nn
    >>> from reparam import LoRA
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> attach(model, LoRA(r=2), targets=["0"], name="task")
    Adapter('task', lora, 1 sites, 16 parameters)
    >>> attach(model, "lora", r=2, targets=["2"], name="other")
    Adapter('other', lora, 1 sites, 12 parameters)
    """
    method = _configured(method, settings)
    wanted = [targets] if isinstance(targets, str) else list(method.default_targets if targets is None else targets)
    names = _reached(model, method, wanted, targets_.resolve(model, wanted))
    ends = [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save
    whole = [path for end in ends for path in targets_.ending(model, end)]
    inside = sorted({n for n in names for w in whole if n == w or n.startswith(w + ".")})
    names = [n for n in names if n not in inside]  # PEFT's rule: what is trained whole needs no update
    method, experts = assemble(model, method, names)
    names = [n for n in names if f"{n}.A" in experts] if experts else names
    bias = bias or method.biases
    adapter = install(model, method, names=names, replaced=whole, name=name, bias=bias, warns=True)
    tensors = adapter.tensors()
    for key, value in experts.items():
        tensors[key].copy_(value)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapter.requires_grad_()
    select(model, name)
    return adapter


def _configured(method: str | Method, settings: Mapping[str, Any]) -> Method:
    """The method itself, or the one of this name with these settings."""
    own = ("targets", "name", "bias", "modules_to_save")
    if not isinstance(method, str):
        if not settings:
            return method
        first = next(iter(settings))
        raise ValueError(
            f"attach: {first}={settings[first]!r} stands beside a configuration{nearest(first, own)}; settings of the "
            f"method belong in it: {type(method).__name__}({first}=...)"
        )
    cls = find_method(method)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    unknown = [f"{key!r}{nearest(key, [*known, *own])}" for key in settings if key not in known]
    if unknown:
        raise ValueError(f"attach: {method} has no setting {', '.join(unknown)}; its settings are {', '.join(known)}")
    return cls(**settings)


def _reached(model: nn.Module, method: Method, wanted: Sequence[str], found: list[str]) -> list[str]:
    """Those of the found sites that the method has a form for.

    Raises ValueError for others that are named by their paths, and where none is left.
    """
    modules = dict(walk(model))
    odd = {name: why for name in found if (why := method.unsupported_reason(targets_.site_of(name, modules[name])))}
    paths = [target for target in wanted if target not in targets_.KEYWORDS]
    named = [name for name in targets_.resolve(model, paths) if name in odd] if odd and paths else []
    if named or len(odd) == len(found):
        reasons: dict[str, list[str]] = {}
        for name in named or found:
            reasons.setdefault(odd[name], []).append(name)
        problems = [f"{listed(names, shown=3)}: {why}" for why, names in reasons.items()]
        raise ValueError(f"{method.name} cannot go on {'; '.join(problems)}")
    return [name for name in found if name not in odd]


def select(model: nn.Module, which: str | Sequence[str | None] | None) -> Selection:
    """Use the adapter with this name from now on; None is the base model.

    A list has one name (or None) per row of the following batches: a mixed batch, for inference. Raises ValueError for
    an unknown name at once, and, at the model's forward, for a batch of another length, before anything is computed.

    The result may be used in a `with`, which puts the previous choice back at its end, also after an exception.
    """
    return state_of(model).select(which)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on the model by name."""
    return dict(state_of(model).adapters) if hasattr(model, "reparam_state") else {}


def remove(model: nn.Module, name: str) -> None:
    """Take the adapter off the model. With the last one gone, the model's own modules are back in place."""
    state = state_of(model)
    state.check(name)
    state.forget(name)
    if not state.adapters:
        unwrap(model)


def unwrap(model: nn.Module) -> None:
    """Put the model's own modules back, with the values that the frozen weights have now; drop all adapters."""
    state = state_of(model)
    state.select(None)
    for path, module in list(walk(model)):
        if isinstance(module, Adapted):
            model.set_submodule(path, module.restore())
        elif isinstance(module, Replaced):
            model.set_submodule(path, module.origin)
    if hasattr(model, SHARED):
        delattr(model, SHARED)
    state.leave()
    describe(model)


def untie(model: nn.Module) -> None:
    """Give the output head a matrix of its own where it shares the embedding's, so that either can be adapted."""
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"{type(model).__name__} has no input and output embeddings that could be tied")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def check_name(model: nn.Module, name: str) -> None:
    """Raise ValueError unless a new adapter on `model` can have this name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"name={name!r}: an adapter's name is made of letters, digits, '_' and '-'")
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise ValueError(f"name={name!r} is also the name of an attribute of torch's containers; choose another")
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
    check: Callable[[dict[str, Tensor]], None] | None = None,
    warns: bool = False,
) -> Adapter:
    """Build all updates, then put them into the model; nothing is touched if building fails, or if `check` raises.

    `check` gets the tensors that will be in the adapter's files, by their names there. With `warns`, the method's notes
    are warnings at the line that called the caller of this; an adapter that was read had them when it was trained.
    """
    check_name(model, name)
    _check_shared(model, names, replaced)
    fresh = [path for path in names if not isinstance(_at(model, path), Adapted)]
    trains = {path: bool(_at(model, path).weight.requires_grad) for path in fresh}
    modules: dict[str, Adapted] = {}
    try:
        for path in names:
            modules[path] = targets_.wrap(_at(model, path))
        sites = {path: module.site(path) for path, module in modules.items()}
        method.check(list(sites.values()))
        for note in method.notes(list(sites.values())) if warns else ():
            warnings.warn(note, stacklevel=3)
        shared = method.shared(list(sites.values()))
        if shared is not None:
            shared.to(modules[names[0]].frozen.device)
        updates = {path: method.build(sites[path], module.frozen, shared) for path, module in modules.items()}
        holders = {path: h if isinstance(h := _at(model, path), Replaced) else Replaced(h) for path in replaced}
        copies = {path: copy.deepcopy(holder.origin) for path, holder in holders.items()}
        for path in names:
            _check_form(path, updates[path], modules[path])
        if check is not None:
            biases = {p: m.bias for p, m in modules.items() if bias and m.bias is not None}
            check(saved(updates, biases, copies, shared))
    except BaseException:
        for path in trains.keys() & modules.keys():  # wrapping froze these, and transposed a Conv1D's matrix
            modules[path].restore().get_parameter("weight").requires_grad_(trains[path])
        raise

    adapter = Adapter(name, method, model)
    adapter.sites, adapter.modules, adapter.replaced, adapter.shared = sites, modules, holders, shared
    for path, module in modules.items():
        module.add(name, updates[path].train(module.training), bias=bias)
        model.set_submodule(path, module)
    for path, holder in holders.items():
        holder.updates[name] = copies[path]
        model.set_submodule(path, holder)
    if shared is not None:
        if not hasattr(model, SHARED):
            model.add_module(SHARED, Shared())
        getattr(model, SHARED)[name] = shared
    adapter.controller = method.controller(adapter.updates)
    if not hasattr(model, "reparam_state"):
        AdapterState(model).join()
    state_of(model).adopt(adapter)
    return adapter


@torch.no_grad()
def _check_form(path: str, update: Update, module: Adapted) -> None:
    """Raise InputDependentError for an update without the form that the site computes with, rows on an embedding say.

    Raises ValueError for a change of the bias where no bias can be.
    """
    module.check_update(update)
    if module.bias is None and not module.can_add_bias and update.bias_delta() is not None:
        raise ValueError(f"{path}: the update changes the bias, and this {module.kind} has none")


def _at(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path)


def _check_shared(model: nn.Module, names: list[str], replaced: list[str]) -> None:
    """Raise ValueError where one adapter would change what something else uses as well."""
    for path, others in tied(model, [*names, *replaced]).items():
        raise ValueError(
            f"{path} shares its weight with {', '.join(others)}; changing one would change the other. Call "
            f"reparam.untie(model) first, or leave it out"
        )
    for path in replaced:
        module = _at(model, path)
        why = targets_.unsupported_whole(module)
        if why:
            raise ValueError(f"{path} cannot be trained whole: {why}; name the parts of it that can")
        inside = () if isinstance(module, Replaced) else module.named_modules()
        taken = [f"{path}.{name}".rstrip(".") for name, part in inside if isinstance(part, Adapted | Replaced)]
        taken += [n for n in (*names, *replaced) if n.startswith(f"{path}.") or (n == path and n in names)]
        if taken:
            raise ValueError(f"{path} cannot be trained whole: {taken[0]} in it is adapted as well; remove that first")
