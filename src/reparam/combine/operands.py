"""Check saved adapters against each other and the base before they are summed, and get their factors in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from reparam.adapter.updates import update_of
from reparam.core.base import Factors, Site, Update, Weight
from reparam.core.checks import listed
from reparam.errors import FormatError, InputDependentError
from reparam.io.record import Record, Tied
from reparam.sites.fingerprint import agree, fingerprint
from reparam.sites.module import Adapted, is_conv1d
from reparam.sites.wrapped import at
from reparam.weights.dense import DenseWeight, zero_weight


class Operand(NamedTuple):
    """A saved adapter and the label that names it in messages, usually its folder."""

    label: str
    record: Record


def all_sites(operands: Sequence[Operand]) -> dict[str, Site]:
    """All sites that at least one adapter changes. Raises FormatError if two adapters disagree on a site's shape."""
    found: dict[str, Site] = {}
    told: dict[str, str] = {}
    for label, record in operands:
        for name, site in record.sites.items():
            if name not in found:
                found[name], told[name] = site, label
            one, other = found[name], site
            if (one.kind, one.out_features, one.in_features) != (other.kind, other.out_features, other.in_features):
                raise FormatError(
                    f"{told[name]} and {label} are made for different bases: {name} is {one.kind}, {one.out_features} "
                    f"x {one.in_features}, in the first and {other.kind}, {other.out_features} x {other.in_features}, "
                    f"in the second"
                )
            found[name] = site if site.transposed else one
    return found


def all_ties(operands: Sequence[Operand]) -> dict[str, Tied]:
    """The modules that use the update of a site. Raises FormatError if the adapters disagree on them."""
    found: dict[str, Tied] = {}
    for _, record in operands:
        found |= record.tied
    for label, record in operands:
        for path, tie in found.items():
            if record.tied.get(path) != tie and (path in record.sites or tie.to in record.sites or path in record.tied):
                raise FormatError(
                    f"{label}: changes {path} or {tie.to} alone, and another adapter changes both with one update "
                    f"(tie); such adapters cannot be summed"
                )
    return found


def check_operands(operands: Sequence[Operand], base: nn.Module | None) -> None:
    """Raise FormatError if the adapters cannot be summed with any weights; `blend` lists the reasons."""
    first: Operand | None = None
    digests = None if base is None else fingerprint(base)
    for label, record in operands:
        if record.replaced:
            raise FormatError(
                f"{label}: this adapter trains {listed(record.replaced)} whole, and whole modules cannot be summed"
            )
        biases = [key for key in record.tensors if key.endswith(".bias") and key.removesuffix(".bias") in record.sites]
        if extra := [f"{path}.bias" for path in record.tied if f"{path}.bias" in record.tensors]:
            raise FormatError(f"{label}: this adapter trains {listed(extra)} of a tied module, which cannot be summed")
        if biases and base is None:
            raise FormatError(
                f"{label}: this adapter trains {listed(biases)}, and their change can be computed only from the base; "
                f"give the base"
            )
        record.method.check(list(record.sites.values()))
        if record.method.shared(list(record.sites.values())) is not None:
            raise FormatError(
                f"{label}: {record.method.name} shares state such as gates between sites, so its change is not a fixed "
                f"matrix and cannot be summed"
            )
        own = record.base.digests if record.base is not None else {}
        if own and digests is not None and not agree(own, digests):
            raise FormatError(f"{label}: trained on a base with different weights than the given base")
        if own and first is not None and not agree(first.record.base.digests, own):  # type: ignore[union-attr]
            raise FormatError(f"{first.label} and {label} were trained on different bases and cannot be summed")
        first = first or (Operand(label, record) if own else None)
    all_sites(operands)
    all_ties(operands)


def check_factors(operands: Sequence[Operand]) -> None:
    """Raise FormatError unless all adapters have the same sites and ranks, so that the A and the B can be summed."""
    (one, first), *rest = operands
    for label, record in rest:
        apart = sorted(first.sites.keys() ^ record.sites.keys())
        if apart:
            raise FormatError(
                f"{one} and {label} adapt different modules: only one of them has {listed(apart)}; use space='delta', "
                f"which can sum such adapters"
            )
    for name in first.sites:
        shapes = [list(factors_of(label, record, name).A.shape) for label, record in operands]
        for shape, (label, _) in zip(shapes, operands, strict=True):
            if shape != shapes[0]:
                raise FormatError(
                    f"{name}: A is {shapes[0]} in {one} and {shape} in {label}; use space='delta', which can sum "
                    f"adapters of different ranks"
                )


@torch.no_grad()
def check_identity(operand: Operand, base: nn.Module | None) -> None:
    """Raise RuntimeError unless the factors of the smallest site compute the same outputs as its update."""
    label, record = operand
    site = min(record.sites.values(), key=lambda s: s.out_features * s.in_features)
    weight = nothing(site) if base is None else base_weight(base, site)
    update, factors = _update(label, record, site.name, weight), factors_of(label, record, site.name, weight)
    if site.kind == "vector":
        found, expected = update.effective_weight(weight), factors.apply(weight.tensor())
    elif site.kind == "embedding":
        ids = torch.arange(min(4, site.out_features))
        found = update.rows(ids, weight)
        expected = weight.rows(ids) + factors.change(weight.rows(ids), slice(0, len(ids)))
    else:
        x = torch.linspace(-1, 1, site.in_features, dtype=torch.float64)[None]
        found = update(x, weight)
        plain = weight(x) if factors.gain is None else weight(x) * factors.gain
        expected = plain + x @ factors.A.T @ factors.B.T
    if not torch.allclose(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())):
        raise RuntimeError(
            f"{label}: the factors of {record.method.name} at {site.name} give other outputs than the update; this is "
            f"a bug in the method"
        )


@torch.no_grad()
def factors_of(label: str, record: Record, name: str, weight: Weight | None = None) -> Factors:
    """The factors of one site of a saved adapter in float64: A [R, I], B [O, R] including the scale, and the gain.

    `weight` is the site's frozen matrix. Raises FormatError, starting with `label`, if the change has no factors, or if
    it has a gain and `weight` is None.
    """
    frozen = nothing(record.sites[name]) if weight is None else weight
    update = _update(label, record, name, frozen)
    factors = update.factors(frozen)
    if factors.gain is not None and weight is None:
        raise FormatError(
            f"{label}: {record.method.name} changes {name} by more than a low-rank matrix: its gain also scales the "
            f"frozen matrix, so a sum needs the base; space 'factor' and the search for weights cannot use a base"
        )
    return factors


def _update(label: str, record: Record, name: str, frozen: Weight) -> Update:
    """The update of one site with its saved values, in float64."""
    try:
        update = update_of(record, name, frozen, dtype=torch.float64).eval()
        update.factors(frozen)
    except (InputDependentError, ValueError, RuntimeError) as error:
        raise FormatError(f"{label}: {record.method.name} at {name} cannot be summed: {error}") from error
    if update.bias_delta() is not None:
        raise FormatError(f"{label}: {record.method.name} changes the bias of {name}; only matrices can be summed")
    return update


def nothing(site: Site) -> Weight:
    """A zero matrix [O, I] of this site's shape in float64, as a placeholder for the frozen weight."""
    return zero_weight(site.out_features, site.in_features, torch.float64)


def base_weight(model: nn.Module, site: Site) -> Weight:
    """The model's frozen matrix at this site in float64. Raises FormatError if it is missing or its shape differs."""
    try:
        module = at(model, site.name)
    except AttributeError:
        raise FormatError(f"the base has no module {site.name}, which the adapters change") from None
    matrix = module.frozen.tensor() if isinstance(module, Adapted) else module.weight.detach()  # type: ignore[operator]
    matrix = matrix.t() if is_conv1d(module) else matrix[:, None] if matrix.ndim == 1 else matrix
    if tuple(matrix.shape) != (site.out_features, site.in_features):
        raise FormatError(
            f"{site.name} has shape {list(matrix.shape)} in the base and [{site.out_features}, {site.in_features}] in "
            f"the adapters; give the base that they were trained on"
        )
    return DenseWeight(matrix.detach().double().cpu())
