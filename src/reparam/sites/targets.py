"""Which modules an adapter goes on: from "all-linear", a suffix or a regular expression to sites of the model."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd

from reparam.core.base import Site
from reparam.core.checks import nearest
from reparam.sites.kinds import KINDS, kind_of
from reparam.sites.module import Adapted, Replaced
from reparam.sites.walk import tied, walk

Targets = str | Iterable[str]
KEYWORDS = ("all-linear", "attention", "mlp", "everything")


def resolve(model: nn.Module, targets: Targets) -> list[str]:
    """Paths of the modules that `targets` names, in the model's order.

    "all-linear" is every linear map but the output head; "attention" and "mlp" are the linear maps of the repeated
    blocks inside, and outside, an attention module; "everything" is all linear maps, embeddings and norms but those
    that share their weight; `re:...` is a regular expression for the whole path of a linear map or an embedding;
    anything else is a path or the end of one, a norm's too. Several may be given. Raises ValueError, with all problems
    at once, where one of them matches nothing (naming the nearest) or something that no update can go on. Warns, naming
    them, of weights that one of the four words stands for and that no update can go on, such as fused experts.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    modules = dict(walk(model))
    linear = {name: unsupported_reason(m) for name, m in modules.items() if (kind := kind_of(m)) and kind.is_map}
    linear |= fused(modules)
    problems: list[str] = []
    found: set[str] = set()
    missed: dict[str, str] = {}
    if not wanted:
        problems.append("no targets were given; try 'all-linear'")
    for target in wanted:
        if target == "everything":
            names, out = _everything(model, modules)
            missed |= out
        elif target in KEYWORDS:
            asked = _keyword(target, list(linear), head=_head(model))
            names = [name for name in asked if linear[name] is None]
            missed |= {name: why for name in asked if (why := linear[name])}
        elif target.startswith("re:"):
            names = _matching(target[3:], modules, problems)
        else:
            names = [name for name in modules if name == target or name.endswith("." + target)]
            problems += [f"{name}: {why}" for name in names if (why := unsupported_reason(modules[name]))]
        if not names:
            problems.append(_nothing(target, modules))
        found |= set(names)
    left = "; ".join(f"{name} ({why})" for name, why in list(missed.items())[:3])
    left += f"; and {len(missed) - 3} more" if len(missed) > 3 else ""
    if problems:
        raise ValueError("targets: " + "; ".join(problems[:10]) + (f"; no update can go on {left}" if left else ""))
    if left:
        warnings.warn(f"targets: no update goes on {left}; they stay as they are in the base", stacklevel=3)
    return [name for name in modules if name in found]


def fused(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Parameters that hold a matrix for each of several experts, which no module stands for: path -> what it is."""
    return {
        f"{path}.{name}": f"a fused weight {list(parameter.shape)}"
        for path, module in modules.items()
        if not isinstance(module, Adapted | Replaced | nn.Bilinear | _ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1 and not _held_by_site(module, name)
    }


def _held_by_site(module: nn.Module, name: str) -> bool:
    """Whether the site that this module is, or would be, stands for its parameter `name`."""
    cls = kind_of(module)
    return cls is not None and name in cls.stands_for


def _matching(pattern: str, modules: Mapping[str, nn.Module], problems: list[str]) -> list[str]:
    """Adaptable modules whose whole path the regular expression matches; a bad one is added to the problems."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        problems.append(f"{pattern!r} is no regular expression: {error}")
        return []
    return [name for name, module in modules.items() if compiled.fullmatch(name) and is_matrix(module)]


def is_matrix(module: nn.Module) -> bool:
    """Whether an update can go on this module, and it is no norm: those are named, or "everything"."""
    kind = kind_of(module)
    return kind is not None and kind.is_matrix and unsupported_reason(module) is None


def _everything(model: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[list[str], dict[str, str]]:
    """Every site of a model, and what trains nowhere then, with the reason."""
    names = [name for name, module in modules.items() if unsupported_reason(module) is None]
    missed = {}
    for name, others in tied(model, names).items():
        missed[name] = f"it shares its weight with {', '.join(others)}: reparam.untie(model), or base.untie, ends that"
    missed |= fused(modules)
    for path, module in (("", model), *modules.items()):
        if not isinstance(module, Adapted | Replaced) and path not in names:
            own = (f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False))
            missed |= {name: f"a parameter of a {type(module).__name__}" for name in own if name not in missed}
    return [name for name in names if name not in missed], missed


def _nothing(target: str, modules: Mapping[str, nn.Module]) -> str:
    usable = {name.rsplit(".", 1)[-1] for name, module in modules.items() if is_matrix(module)}
    return (
        f"{target!r} matches no module{nearest(target, [*usable, *modules])}; possible ends of paths "
        f"are {', '.join(sorted(usable)) or 'none'}"
    )


def ending(model: nn.Module, end: str) -> list[str]:
    """Paths of the modules of any kind whose path is `end` or ends with it. Raises ValueError where there is none."""
    modules = dict(walk(model))
    found = [name for name in modules if name == end or name.endswith("." + end)]
    if not found:
        raise ValueError(f"modules_to_save: {end!r} matches no module{nearest(end, modules)}")
    return found


def unsupported_reason(module: nn.Module) -> str | None:
    """Why no update can go on this module, or None."""
    if isinstance(module, Adapted):
        return None
    if isinstance(module, Replaced):
        return f"{', '.join(module.updates)} trains this module whole, so that no update of it can be added"
    kind = kind_of(module)
    if kind is None:
        *most, last = (cls.plural for cls in KINDS.values())
        return f"{type(module).__name__} is not a linear map; adapters go on {', '.join(most)} and {last}"
    return kind.unsupported_reason(module)


def unsupported_whole(module: nn.Module) -> str | None:
    """Why `Replaced` cannot stand in for this module, or None: it hands on one input, and no attributes."""
    if isinstance(module, Adapted | Replaced):
        return None
    kind = type(module).__name__
    if type(module).forward is nn.Module.forward:
        return f"a {kind} has no forward of its own"
    takes = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in takes if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return f"{kind} takes more than one input ({', '.join(names[:3])})" if len(names) > 1 else None


def _keyword(target: str, linear: list[str], *, head: str | None) -> list[str]:
    if target == "all-linear":
        return [name for name in linear if name != head]
    blocks = [name for name in linear if name != head and re.search(r"(^|\.)\d+\.", name)]
    attention = [name for name in blocks if re.search(r"attn|attention", name.rsplit(".", 1)[0], re.IGNORECASE)]
    return attention if target == "attention" else [name for name in blocks if name not in attention]


def _head(model: nn.Module) -> str | None:
    """Path of the output head: what transformers calls the output embeddings, or a classifier at the top level."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    for name, module in model.named_modules():
        if module is head or (head is None and name in ("lm_head", "score", "classifier")):
            return name
    return None


def wrap(module: nn.Module) -> Adapted:
    """The adapted form of a module that `resolve` allowed."""
    if isinstance(module, Adapted):
        return module
    kind = kind_of(module)
    if kind is None:
        raise ValueError(unsupported_reason(module))
    return kind.wrap(module)


def site_of(path: str, module: nn.Module) -> Site:
    """The site that a module which `resolve` allowed is, or would be."""
    if isinstance(module, Adapted):
        return module.site(path)
    kind = kind_of(module)
    if kind is None:
        raise ValueError(f"{path}: {unsupported_reason(module)}")
    return kind.describe(path, module)


def sizes(module: nn.Module) -> tuple[str, int, int]:
    """Kind, O and I that a module has, or would have, as a site."""
    site = site_of("", module)
    return site.kind, site.out_features, site.in_features
