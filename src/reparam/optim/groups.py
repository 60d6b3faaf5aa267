"""LoRA+: the factor B is trained with a larger learning rate than A (Hayou, Ghosh & Yu 2024, arXiv 2402.12354).

    A <- A - η ĝ_A        B <- B - λ η ĝ_B        λ ≥ 1 is fixed; only η is tuned

LoRA+ only changes the optimizer's parameter groups; forward, initialization, files and merging are those of LoRA. The
groups follow the declared roles of parameters, so LoRA+ works for every method with parameters of the role "out".

The paper recommends λ = 16, and the released scripts use 10 to 80. The best λ depends on the task: with B = 0 at the
start, the paper reports 4 to 8 for RoBERTa and 2 to 4 for Llama-7b, a larger λ for harder tasks, and an η of about half
of plain LoRA's. A fair baseline is a LoRA whose η was tuned too (arXiv 2602.04998 argues that it performs equally).

If the paper and the released code (https://github.com/nikhil-ghosh-berkeley/loraplus, which PEFT follows) differ, this
file follows the code: vectors (biases, norm gains, DoRA's magnitudes) also have the rate λη, and the factors of
embeddings have a separate rate, 1e-6, which is not a multiple of η. Empty groups are omitted.
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
    """LoRA+ parameter groups for any optimizer, in the order of the released code. Each parameter is in one group.

    - "in", with the rate `lr`: A, cores, routers, and matrices of fully trained modules.
    - "embedding", with the rate `embedding_lr`: all parameters at embeddings.
    - "out", with the rate `lr · ratio`: B and, by default, vectors.

    Besides the keys that optimizers read, a group has a `name` and a `multiple`, its rate divided by `lr`, which
    `check_rates` uses. Decoupled weight decay is proportional to the rate of a group, so B's is `ratio` times A's.

    Args:
        parameters: tuples of name (the site's path, a dot, and the rest), parameter and role, as
            `adapter.named_parameters()` yields them.
        sites: the sites by path, which tell embeddings apart: `adapter.sites`.
        lr: η, above 0.
        ratio: λ, above 0. Warns below 1, which would train B more slowly than A, and above 100.
        embedding_lr: an absolute rate, at least 0.
        vectors: the group of gains and of one-dimensional parameters without a role: "out", as in the released
            code, or "in".
        weight_decay: at least 0; 0 is used for `no_decay`.
        no_decay: by default the one-dimensional parameters without a role: biases and the gains of norms.

    Raises:
        ValueError: a number is out of range, parameters are frozen, or no parameter at a linear map has the role "out";
            the message lists all problems.

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
        what = "parameter is" if len(frozen) == 1 else "parameters are"
        problems.append(f"{len(frozen):,} {what} frozen (first: {frozen[0]}); call adapter.requires_grad_()")
    kinds = [_kind(name, parameter, role, sites, vectors) for name, parameter, role in held]
    if not any(role == "out" and kind == "out" for (_, _, role), kind in zip(held, kinds, strict=True)):
        found = sorted({role or "none" for _, _, role in held})
        problems.append(
            f"of {len(held)} parameters none has the role 'out' at a linear map (roles: {', '.join(found) or 'none'}), "
            f"so LoRA+ has no effect; leave it out, or use a method with two factors, such as lora"
        )
    if problems:
        raise ValueError("LoRA+: " + "; ".join(problems))
    if ratio < 1 or ratio > _HIGH:
        why = (
            "B would learn more slowly than A, the reverse of LoRA+"
            if ratio < 1
            else "the released scripts use at most 80"
        )
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
    """Check that the rates of an optimizer's groups still have the ratios that `lora_plus` gave them.

    Schedules that multiply all rates keep the ratios; code that sets a rate directly can break them. Groups that
    `lora_plus` did not make are ignored. Rates may be tensors; the relative tolerance is 1e-5.

    Raises ValueError if a ratio has changed, or if no group is from `lora_plus`.

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
        raise ValueError(
            "LoRA+: none of the optimizer's groups is from lora_plus(...): create the optimizer with those groups"
        )
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
            f"rates is fixed. Something set the rates directly (a schedule with a minimum or maximum rate, or one rate "
            f"for all groups): use a schedule that multiplies them, such as cosine, linear or constant"
        )


def _bad_numbers(lr: float, ratio: float, embedding_lr: float, weight_decay: float) -> list[str]:
    above = {"lr": lr, "ratio": ratio}
    least = {"embedding_lr": embedding_lr, "weight_decay": weight_decay}
    problems = [f"{k}={v!r}: expected a finite number above 0" for k, v in above.items() if not (finite(v) and v > 0)]
    return problems + [
        f"{k}={v!r}: expected a finite number of at least 0" for k, v in least.items() if not (finite(v) and v >= 0)
    ]


def _kind(name: str, parameter: nn.Parameter, role: Role | None, sites: Mapping[str, Site], vectors: str) -> str:
    """The group of a parameter: "in", "out" or "embedding"."""
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    site = next((sites[path] for path in paths if path in sites), None)
    if site is not None and site.kind == "embedding":
        return "embedding"
    if role == "gain" or _loose(parameter, role):
        return vectors
    return "out" if role == "out" else "in"


def _loose(parameter: nn.Parameter, role: Role | None) -> bool:
    """Whether it is one-dimensional without a role: a bias, or the gain of a fully trained norm."""
    return role is None and parameter.ndim == 1
