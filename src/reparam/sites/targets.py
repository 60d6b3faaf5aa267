"""Resolve targets ("all-linear", a path suffix, a regular expression) to the modules of a model."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from reparam.core.base import Site
from reparam.core.checks import nearest
from reparam.core.placing import patched
from reparam.core.surface import advice
from reparam.core.text import counted
from reparam.sites.expert_paths import routers
from reparam.sites.experts import ExpertSlot, Opened, closed_reason, opened, original_class, stacks_of
from reparam.sites.keywords import KEYWORDS as KEYWORDS
from reparam.sites.keywords import keyword
from reparam.sites.kinds import KINDS, kind_of
from reparam.sites.module import Adapted
from reparam.sites.offloaded import beneath_offload, offloads
from reparam.sites.parts import WORDS, Parts, parts_of
from reparam.sites.reads import never_called, read_without_call
from reparam.sites.replaced import Replaced
from reparam.sites.walk import other_paths, tied, walk
from reparam.sites.wrapped import bare

Targets = str | Iterable[str]
SHOWN = 5  # paths or targets that a message lists for one problem
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")

_LACKS = dict.fromkeys(("experts", "router"), ": this model is no mixture of experts that reparam knows")


def resolve(model: nn.Module, targets: Targets, *, tie: bool = False) -> list[str]:
    """The paths of the modules that `targets` selects, in the model's order. Several targets can be given:

    - "all-linear": all linear maps, also those of experts, except the output head and the routers of experts.
    - "attention" and "mlp": the linear maps of the repeated blocks inside and outside an attention module.
    - "experts": the linear maps of the experts of a Mixture-of-Experts model; "router": those that choose the experts.
    - "language", "vision" and "projector": the linear maps of these parts of a vision-language model;
      "vision.attention" and the like: those inside or outside an attention module. On such a model, the words above
      select in the language model alone.
    - "everything": all linear maps, embeddings and norms, but no routers, that do not share their weight with another
      module, or, with `tie`, all of them.
    - "re:...": a regular expression that matches the whole path of a linear map or an embedding.
    - anything else: a module's path or the end of one; it can also select a norm.

    Raises ValueError, with up to five names for each problem, if a target matches nothing or a module that cannot be
    adapted. Warns if one of these keywords skips weights that cannot be adapted, such as fused experts.
    """
    with opened(model):
        return _resolved(model, [targets] if isinstance(targets, str) else list(targets), tie=tie)


def _resolved(model: nn.Module, wanted: list[str], *, tie: bool) -> list[str]:
    modules = dict(walk(model))
    paths = {path: path for path in modules} | other_paths(model)
    odd = unsupported(model, modules)
    parts = parts_of(model)
    linear = {name: odd.get(name) for name, m in modules.items() if (kind := kind_of(m)) and kind.is_map}
    linear |= fused(modules)
    problems: list[str] = []
    absent: list[str] = []  # targets that match nothing
    refused: dict[str, list[str]] = {}  # the paths of modules that cannot be adapted, by reason
    found: set[str] = set()
    missed: dict[str, str] = {}
    if not wanted:
        problems.append("no targets were given; try 'all-linear'")
    for target in wanted:
        if target == "everything":
            names, out = _everything(model, modules, odd, tie=tie)
            missed |= out
        elif target in KEYWORDS or (parts is not None and target in WORDS):
            asked = keyword(target, list(linear), heads=_heads(model, linear), routers=routers(modules), parts=parts)
            names = [name for name in asked if linear.get(name, odd.get(name)) is None]
            missed |= {name: why for name in asked if (why := linear.get(name, odd.get(name)))}
        elif target.startswith("re:"):
            matching = _matching(target[3:], paths, modules, problems)
            if matching is None:
                continue
            names = [name for name in matching if name not in odd]
        else:
            names = _within_experts(_ending(target, paths), modules)
            for name in names:
                if name in odd:
                    refused.setdefault(odd[name], []).append(name)
        if not names:
            absent.append(target)
        found |= set(names)
    left = "; ".join(f"{name} ({why})" for name, why in list(missed.items())[:3])
    left += f"; and {len(missed) - 3} more" if len(missed) > 3 else ""
    nothing, usable = _nothing(absent, modules, parts) if absent else ([], [])
    problems += [*nothing, *(f"{_shown(names)}: {why}" for why, names in refused.items()), *usable]
    if problems:
        raise ValueError("targets: " + "; ".join(problems) + (f"; unsupported: {left}" if left else ""))
    if left:
        share = _share(model, missed)
        warnings.warn(f"targets: skipped {left}; these weights stay unchanged{share}", stacklevel=4)
    return [name for name in modules if name in found]


def _share(model: nn.Module, paths: Iterable[str]) -> str:
    """Which part of the model's weights these modules and parameters hold, for a message; "" if that is below 0.1 %."""
    sizes = {name: parameter.numel() for name, parameter in bare(model).named_parameters()}
    left = tuple(f"{path}." for path in paths)
    inside = sum(size for name, size in sizes.items() if f"{name}.".startswith(left))
    share = 100 * inside / max(1, sum(sizes.values()))
    return f" ({share:.1f} % of the model's parameters)" if share >= 0.1 else ""


def fused(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Three-dimensional parameters, such as the fused matrices of several experts: path -> description."""
    return {
        f"{path}.{name}": _fused_reason(module, parameter)
        for path, module in modules.items()
        if not isinstance(module, Opened | Adapted | Replaced | nn.Bilinear | _ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1 and not _held_by_site(module, name)
    }


def _fused_reason(module: nn.Module, parameter: nn.Parameter) -> str:
    why = closed_reason(module) if stacks_of(module) else None
    return f"a fused weight {list(parameter.shape)}" + (f": {why}" if why else "")


def _held_by_site(module: nn.Module, name: str) -> bool:
    """Whether the site of this module adapts the parameter `name`."""
    cls = kind_of(module)
    return cls is not None and name in cls.stands_for


def _matching(
    pattern: str, paths: Mapping[str, str], modules: Mapping[str, nn.Module], problems: list[str]
) -> list[str] | None:
    """Modules whose path the regular expression fully matches, without norms; None, and a new problem, if invalid."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        problems.append(f"{pattern!r} is not a valid regular expression: {error}")
        return None
    found = {name for path, name in paths.items() if compiled.fullmatch(path)}
    return [name for name, module in modules.items() if name in found and is_matrix(module)]


def _ending(target: str, paths: Mapping[str, str]) -> list[str]:
    """Modules with a path that is `target` or ends with it; `paths` maps each path of a module to its first one."""
    return list({name: None for path, name in paths.items() if path == target or path.endswith("." + target)})


def _within_experts(names: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The names, with the sites inside in the place of a module of experts and of a single expert."""
    found: dict[str, None] = {}
    for name in names:
        whole = isinstance(modules[name], Opened | ExpertSlot)
        inside = [path for path in modules if path.startswith(f"{name}.") and isinstance(modules[path], Adapted)]
        found |= dict.fromkeys(inside if whole else [name])
    return list(found)


def is_matrix(module: nn.Module) -> bool:
    """Whether this module can be adapted and is not a norm. Norms are selected only by path or by "everything"."""
    kind = kind_of(module)
    return kind is not None and kind.is_matrix and unsupported_reason(module) is None


def _everything(
    model: nn.Module, modules: Mapping[str, nn.Module], odd: Mapping[str, str], *, tie: bool
) -> tuple[list[str], dict[str, str]]:
    """The paths of all sites of a model, and the skipped weights with the reason for each."""
    apart = routers(modules)
    names = [name for name in modules if name not in odd and name not in apart]
    sites = {name for name, module in modules.items() if kind_of(module) and not isinstance(module, Replaced)}
    missed = {name: why for name, why in odd.items() if name in sites}
    for name, others in () if tie else tied(model, names).items():
        remedy = advice("call reparam.untie(model) or attach with tie=True", "pass --base.untie or --adapter.tie")
        missed[name] = f"it shares its weight with {', '.join(others)}: {remedy}"
    missed |= fused(modules)
    for path, module in (("", model), *modules.items()):
        if not isinstance(module, Adapted | Replaced) and path not in names and path not in apart:
            held = stacks_of(module) if isinstance(module, Opened) else ()
            own = (f"{path}.{name}".lstrip(".") for name in module._parameters if name not in held)
            missed |= {
                name: f"a parameter of the unsupported module {type(module).__name__}"
                for name in own
                if name not in missed
            }
    return [name for name in names if name not in missed], missed


def _nothing(
    targets: Sequence[str], modules: Mapping[str, nn.Module], parts: Parts | None
) -> tuple[list[str], list[str]]:
    """The problems of targets that match nothing: the first ones with the names that are close; and what there is."""
    usable = sorted({name.rsplit(".", 1)[-1] for name, module in modules.items() if is_matrix(module)})
    words = [*KEYWORDS, *(WORDS if parts is not None else ())]
    bare_part = "has no such part" if parts is None else "has no linear map in that part"
    lacks = _LACKS | dict.fromkeys(WORDS, f": this model {bare_part}")
    found = [
        f"{target!r} matches no module{lacks.get(target) or nearest(target, [*words, *usable, *modules])}"
        for target in targets[:SHOWN]
    ]
    more = len(targets) - SHOWN
    found += [f"{counted(more, 'more target')} without a match"] if more > 0 else []
    return found, [f"possible path endings are {_shown(usable, 4 * SHOWN) or 'none'}"]


def _shown(names: Sequence[str], most: int = SHOWN) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def ending(model: nn.Module, end: str) -> list[str]:
    """The paths of all modules, of any type, whose path is `end` or ends with it. Raises ValueError if none does."""
    modules = dict(walk(model))
    found = _ending(end, {path: path for path in modules} | other_paths(model))
    if not found:
        raise ValueError(f"modules_to_save: {end!r} matches no module{nearest(end, modules)}")
    return found


def unsupported(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The modules of a model that no update can be attached to: path -> reason."""
    found = {name: why for name, module in modules.items() if (why := unsupported_reason(module))}
    reads = read_without_call(model) | never_called(model) | beneath_offload(model)
    return found | {name: why for name, why in reads.items() if name in modules and name not in found}


def unsupported_reason(module: nn.Module) -> str | None:
    """Why this module cannot be adapted, or None if it can."""
    if isinstance(module, Adapted):
        return None
    if isinstance(module, Replaced):
        return f"{', '.join(module.updates)} trains a full copy of this module, so no update can be attached to it"
    kind = kind_of(module)
    if kind is None:
        *most, last = (cls.plural for cls in KINDS.values())
        return f"{type(module).__name__} is not supported; adapters support {', '.join(most)} and {last}"
    if module._parameters.get("weight") is None:
        return (
            f"the weight of this {type(module).__name__} is computed from other parameters (weight_norm, spectral_norm "
            f"or another parametrization); remove the parametrization first"
        )
    return kind.unsupported_reason(module)


def unsupported_whole(module: nn.Module) -> str | None:
    """Why `Replaced` cannot replace this module; or None if it can.

    It passes on no attributes. In a mixed batch it can give the parts of one input to the copies, or all inputs to each
    copy of an embedding, such as OPT's positions.
    """
    if isinstance(module, Adapted | Replaced):
        return None
    kind = type(module).__name__
    if offloads(module):
        return "accelerate offloads its weights, which only a forward pass has; load the model without offloading"
    if any(patched(part) for part in module.modules()):
        return f"the forward of this {kind} or of a module in it is patched, and a copy would call the original"
    if type(module).forward is nn.Module.forward:
        return f"{kind} does not define forward"
    if isinstance(module, nn.Embedding):
        return None
    forward = original_class(module).forward.__get__(module) if isinstance(module, Opened) else module.forward
    takes = inspect.signature(forward).parameters.values()
    names = [p.name for p in takes if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return f"{kind} takes more than one input ({', '.join(names[:3])})" if len(names) > 1 else None


def _head(model: nn.Module) -> str | None:
    """Path of the output head: `model.get_output_embeddings()`, or else a top-level lm_head, score or classifier."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    for name, module in walk(model):
        if (head is not None and module is bare(head)) or (head is None and name in ("lm_head", "score", "classifier")):
            return name
    return None


def _heads(model: nn.Module, linear: Iterable[str]) -> set[str]:
    """Paths of the linear maps of the output head; of a classifier, of all that lie outside its base model."""
    head, owner = _head(model), bare(model)
    inner = getattr(owner, "base_model_prefix", "-")
    classifies = type(owner).__name__.endswith(CLASSIFIERS) and hasattr(owner, inner)
    return {head or ""} | {name for name in linear if classifies and not name.startswith(f"{inner}.")}


def wrap(module: nn.Module) -> Adapted:
    """The adapted form of a module that `resolve` selected; an adapted module is returned as it is."""
    if isinstance(module, Adapted):
        return module
    kind = kind_of(module)
    if kind is None:
        raise ValueError(unsupported_reason(module))
    return kind.wrap(module)


def site_of(path: str, module: nn.Module) -> Site:
    """The site for a module that `resolve` selected, adapted or not; `path` is its path in the model."""
    if isinstance(module, Adapted):
        return module.site(path)
    kind = kind_of(module)
    if kind is None:
        raise ValueError(f"{path}: {unsupported_reason(module)}")
    return kind.describe(path, module)


def sizes(module: nn.Module) -> tuple[str, int, int]:
    """Kind, O and I of a module's site, adapted or not."""
    site = site_of("", module)
    return site.kind, site.out_features, site.in_features
