"""LoRA+: what makes the output learns faster than what meets the input (Hayou, Ghosh & Yu 2024, arXiv 2402.12354).

    A <- A - η ĝ_A        B <- B - λ η ĝ_B        λ ≥ 1 fixed; only η is tuned

Forward, initial values, files and merging are LoRA's; all of it is parameter groups. They are made from declared roles,
so that it works for any method whose updates have a parameter of the role "out".

The paper's rule of thumb is λ = 16, and the released scripts use 10 to 80. It is no constant: the optimum reported for
B = 0 at first is 4 to 8 on RoBERTa and 2 to 4 on Llama-7b; harder tasks are said to want a larger λ, and an η of about
half of plain LoRA's. Compare with a LoRA whose own η was tuned too (arXiv 2602.04998 argues that it then matches).

Where texts and the released code (https://github.com/nikhil-ghosh-berkeley/loraplus; PEFT follows it) differ, the
code counts here: vectors (biases, norm gains, DoRA's magnitudes) learn at λη too, and the factors of embeddings at a
rate of their own, 1e-6, that is no multiple of η. Groups that would be empty are left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from reparam.core.base import Role, Site
from reparam.core.checks import finite

ORDER = ("in", "embedding", "out")
_HIGH = 100


def lora_plus(
    parameters: Iterable[tuple[str, nn.Parameter, Role | None]],
    sites: Mapping[str, Site],
    *,
    lr: float,
    ratio: float = 16.0,
    embedding_lr: float = 1e-6,
    vectors: Literal["out", "in"] = "out",
    weight_decay: float = 0.0,
    no_decay: Iterable[nn.Parameter] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: each parameter in one of them, in upstream's order, none of them empty.

    "in" has the rate `lr`: A, cores, routers, matrices of modules that train whole. "out" has `lr · ratio`: B, and by
    default vectors. "embedding" has `embedding_lr`: whatever is at an embedding. Beside what optimizers read, a group
    has a `name` and `multiple`, its rate as a multiple of `lr`, which `check_rates` goes by. Decoupled weight decay
    is in proportion to a group's rate, so that B's is `ratio` times A's.

    Args:
        parameters: name (a site's, a dot, and the rest), parameter and role: `adapter.named_parameters()`.
        sites: by name, to know which are embeddings: `adapter.sites`.
        lr: η, above 0.
        ratio: λ, above 0; a warning below 1, where B would be the slower one, and above 100.
        embedding_lr: an absolute rate, at least 0.
        vectors: whether gains, and what has one dimension and no role, learn as "out" does (upstream), or as "in".
        weight_decay: at least 0; not for `no_decay`.
        no_decay: by default what has one dimension and no role: biases and the gains of norms.

    Raises:
        ValueError: a number out of range, frozen parameters, or nothing to give the ratio to; all at once.

    >>> import torch, reparam
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    >>> adapter = reparam.attach(model, reparam.LoRA(r=2), targets="all-linear")
    >>> groups = reparam.optim.lora_plus(adapter.named_parameters(), adapter.sites, lr=1e-3, ratio=16)
    >>> [(group["name"], group["lr"], len(group["params"])) for group in groups]
    [('in', 0.001, 2), ('out', 0.016, 2)]
    >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    held = list(parameters)
    problems = _bad_numbers(lr, ratio, embedding_lr, weight_decay)
    if vectors not in ("out", "in"):
        problems.append(f"vectors={vectors!r}: expected 'out' or 'in'")
    frozen = [name for name, parameter, _ in held if not parameter.requires_grad]
    if frozen:
        problems.append(f"{len(frozen)} parameters are frozen (first: {frozen[0]}); call adapter.requires_grad_()")
    kinds = [_kind(name, parameter, role, sites, vectors) for name, parameter, role in held]
    if not any(role == "out" and kind == "out" for (_, _, role), kind in zip(held, kinds, strict=True)):
        found = sorted({role or "none" for _, _, role in held})
        problems.append(
            f"of {len(held)} parameters none has the role 'out' at a linear map (roles: {', '.join(found) or 'none'}), "
            f"so that this would be plain training; leave the ratio out, or use a method with two factors, such as lora"
        )
    if problems:
        raise ValueError("LoRA+: " + "; ".join(problems))
    if ratio < 1 or ratio > _HIGH:
        why = "B would be slower than A, the reverse of LoRA+" if ratio < 1 else "the released scripts use at most 80"
        warnings.warn(f"LoRA+: ratio={ratio!r}: {why}; 16 is usual", stacklevel=2)
    kept = {id(p) for p in no_decay} if no_decay is not None else {id(p) for _, p, role in held if _loose(p, role)}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {
        (kind, decays): [] for kind in ORDER for decays in (True, False)
    }
    for (_, parameter, _), kind in zip(held, kinds, strict=True):
        members[kind, id(parameter) not in kept].append(parameter)
    rates = {"in": lr, "embedding": embedding_lr, "out": lr * ratio}
    multiples = {"in": 1.0, "embedding": embedding_lr / lr, "out": float(ratio)}
    return [
        {
            "params": group,
            "lr": rates[kind],
            "weight_decay": weight_decay if decays else 0.0,
            "name": kind if decays else f"{kind}, no decay",
            "multiple": multiples[kind],
        }
        for (kind, decays), group in members.items()
        if group
    ]


def check_rates(groups: Iterable[Mapping[str, Any]]) -> None:
    """Check that the rates of an optimizer's groups still stand in the proportions that `lora_plus` gave them.

    Schedules that multiply keep them, at any step; whatever sets a rate as such does not. Groups from elsewhere are
    left out. Rates may be tensors; the relative tolerance is 1e-5.

    Raises ValueError when they do not, or when no group is LoRA+'s.

    >>> groups = [{"name": "in", "lr": 0.5, "multiple": 1.0}, {"name": "out", "lr": 8.0, "multiple": 16.0}]
    >>> check_rates(groups)
    >>> for group in groups:
    ...     group["lr"] = 0.5
    >>> check_rates(groups)
    Traceback (most recent call last):
    ...
    ValueError: LoRA+: the learning rate of 'in' is 0.5 and has to be 0.03125, ...
    """
    own = [group for group in groups if "multiple" in group]
    if not own:
        raise ValueError("LoRA+: none of the optimizer's groups is from lora_plus(...): make the optimizer from those")
    most = max(own, key=lambda group: group["multiple"])
    unit = float(most["lr"]) / most["multiple"]
    wrong = [
        f"the learning rate of {group['name']!r} is {float(group['lr']):g} and has to be {unit * group['multiple']:g}"
        for group in own
        if not math.isclose(float(group["lr"]), unit * group["multiple"], rel_tol=1e-5)
    ]
    if wrong:
        raise ValueError(
            f"LoRA+: {'; '.join(wrong)}, because {most['name']!r} has {float(most['lr']):g} and the ratio of their "
            f"rates is fixed. Something set rates as such (a schedule with a lowest or highest rate, one rate for all "
            f"groups): use a schedule that multiplies, such as cosine, linear or constant"
        )


def _bad_numbers(lr: float, ratio: float, embedding_lr: float, weight_decay: float) -> list[str]:
    above = {"lr": lr, "ratio": ratio}
    least = {"embedding_lr": embedding_lr, "weight_decay": weight_decay}
    problems = [f"{k}={v!r}: expected a finite number above 0" for k, v in above.items() if not (finite(v) and v > 0)]
    return problems + [
        f"{k}={v!r}: expected a finite number of at least 0" for k, v in least.items() if not (finite(v) and v >= 0)
    ]


def _kind(name: str, parameter: nn.Parameter, role: Role | None, sites: Mapping[str, Site], vectors: str) -> str:
    """ "in", "out" or "embedding"."""
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    site = next((sites[path] for path in paths if path in sites), None)
    if site is not None and site.kind == "embedding":
        return "embedding"
    if role == "gain" or _loose(parameter, role):
        return vectors
    return "out" if role == "out" else "in"


def _loose(parameter: nn.Parameter, role: Role | None) -> bool:
    """Whether it is a bias, or a gain of a norm that trains whole: one dimension, and no part of an update."""
    return role is None and parameter.ndim == 1
