"""Merge the active adapter into the base weights, and measure how much of the update survives rounding.

Each site is merged in blocks of rows: W' = diag(gain) W + B A is computed in float32 (float64 for a float64 base), cast
once, and written over the base. Quantized matrices are dequantized to the dtype of their outputs first, so the result
is the W that the adapter was trained on plus ΔW. The report states for each site which share of the update
ΔW = W' − W the written weight contains:

    survival = ⟨written − W, ΔW⟩ / ⟨ΔW, ΔW⟩        1: all of the update, 0: none of it

Rounding to bfloat16 can remove a small update; `merge` warns below 0.99. Rounding to four bits removes most of it.
Therefore matrices are quantized again only if the caller names the storage, and only if at least 0.9 survives.
"""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor, nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.attach import unwrap
from reparam.adapter.fold import SiteMerge, check_finite, fold, measured, short, survival
from reparam.adapter.quantize import describe
from reparam.adapter.selection import AdapterState, state_of
from reparam.core.base import Weight
from reparam.core.checks import listed
from reparam.core.progress import tracked
from reparam.core.text import counted
from reparam.sites.experts import Opened, open_experts, stacks_of
from reparam.sites.module import SHARED, Adapted
from reparam.sites.offloaded import check_placed
from reparam.sites.walk import put

ENOUGH = 0.99
"""`merge` warns if a smaller share of the update survives."""
LEAST = 0.9
"""`merge(into=...)` refuses to write if a smaller share of the update would survive, unless `force` is set."""


@dataclasses.dataclass(frozen=True)
class _Undo:
    model: nn.Module
    state: AdapterState
    choice: str
    modules: dict[str, nn.Module]
    weights: dict[str, Weight]
    values: dict[str, Tensor]
    biases: dict[str, Tensor]
    origins: dict[str, nn.Module]


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """The result of `merge` for each site, and `restore` if the merge kept the base."""

    adapter: str
    sites: tuple[SiteMerge, ...]
    replaced: tuple[str, ...]
    """Paths of the modules that were replaced by the adapter's trained copies."""
    biased: tuple[str, ...] = ()
    """Paths of the modules to which the merge added a bias."""
    idle: bool = False
    """Whether the merge changed nothing: every ΔW is exactly zero, and no bias and no whole module differs."""
    undo: _Undo | None = dataclasses.field(default=None, repr=False)

    def survival(self) -> dict[torch.dtype | str, float]:
        """Share of ΔW that survived, over all dense sites by dtype, and over all quantized sites by storage name."""
        return survival(self.sites)

    def __repr__(self) -> str:
        kept = (
            ["nothing changed"]
            if self.idle
            else [f"{share:.4f} survives in {short(kind)}" for kind, share in self.survival().items()]
        )
        whole = [f"{counted(len(self.replaced), 'module')} whole"] if self.replaced else []
        base = [] if self.undo is None else ["base kept"]
        return f"MergeReport({', '.join([repr(self.adapter), counted(len(self.sites), 'site'), *whole, *kept, *base])})"

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the base bit for bit, with all its adapters and the active one selected.

        Raises ValueError unless the merge was made with `keep_base=True`.
        """
        if self.undo is None:
            raise ValueError("restore: the merge did not keep the base; merge with keep_base=True, or reload the base")
        undo = self.undo
        for module in list(undo.model.modules()):
            if stacks_of(module) and not isinstance(module, Opened):
                open_experts(module)
        put(undo.model, {path: module for path, module in undo.modules.items() if path != SHARED})
        if SHARED in undo.modules:
            undo.model.add_module(SHARED, undo.modules[SHARED])
        for path, module in undo.modules.items():
            if isinstance(module, Adapted) and path in undo.weights:
                module.hold(undo.weights[path])
                if path in undo.values:
                    module.frozen.dense_or_none.copy_(undo.values[path])  # type: ignore[union-attr]
                if path in undo.biases:
                    module.bias.copy_(undo.biases[path])  # type: ignore[union-attr]
                elif module.bias is not None:
                    module.set_bias(None)
        for path, origin in undo.origins.items():
            undo.state.replaced[path].origin = origin
        undo.state.join()
        describe(undo.model)
        undo.state.select(undo.choice)

    def __str__(self) -> str:
        where = counted(len(self.sites), "site")
        if self.idle:
            return (
                f"merged {self.adapter!r} into {where}, and nothing changed: every update is exactly zero, as in an "
                f"adapter that was never trained"
            )
        still = sum(not site.change for site in self.sites)
        unchanged = f" ({still:,} of them unchanged, because their updates are exactly zero)" if still else ""
        if not self.sites:
            return f"merged {self.adapter!r}: it replaces {counted(len(self.replaced), 'module')} whole"
        shares = ", ".join(f"{share:.4f} in {short(kind)}" for kind, share in self.survival().items())
        noise = sum((site.noise * site.change) ** 2 for site in self.sites if site.noise is not None)
        total = sum(site.change**2 for site in self.sites if site.noise is not None)
        beside = f", plus rounding noise of {(noise / total) ** 0.5:.2f} times its norm" if total else ""
        return (
            f"merged {self.adapter!r} into {where}{unchanged}; share of the update that survives rounding: "
            f"{shares}{beside}"
        )


@torch.no_grad()
def merge(
    model: nn.Module,
    *,
    keep_base: bool = False,
    into: str | None = None,
    rounding: str = "aware",
    force: bool = False,
) -> MergeReport:
    """Merge the selected adapter into the base weights; then remove all adapters and restore the original modules.

    Args:
        model: a model with exactly one adapter selected.
        keep_base: copy the base first, so that the report's `restore` can undo the merge.
        into: name of the storage of the adapted quantized matrices, to quantize them again after the merge. By default
            they become dense, in the dtype of their outputs. Quantized matrices without an update do not change.
        rounding: with `into`: "nearest" rounds W' and loses almost all of a small update; "aware" chooses the codes so
            that the effect of the update stays (`weights/rounding.py`).
        force: with `into`: merge even if less than `LEAST` (0.9) of the update survives.

    Raises, before the model is changed, ValueError if no single adapter is selected, the method changes no weights, a
    merged weight or bias would not be finite, or too little of the update would survive, and `InputDependentError` if
    the update depends on its input and therefore cannot be a matrix. Warns if less than 0.99 of the update survives.
    """
    state = state_of(model)
    name = state.choice
    if not isinstance(name, str):
        raise ValueError(
            f"merge needs one selected adapter, but {name!r} is selected; select one of {', '.join(state.adapters)}"
        )
    adapter = state.adapters[name]
    if not adapter.modules and not adapter.replaced:
        raise ValueError(f"{adapter.method.name} changes no weights, so there is nothing to merge")
    check_placed(model, adapter.modules, "merge")
    bad = [key for key, t in adapter.tensors().items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise ValueError(f"adapter {name!r}: NaN or infinity in {', '.join(bad[:5])}; nothing was merged")
    for path, module in adapter.modules.items():
        check_finite(path, module.frozen, module.updates[name].factors(module.frozen))  # type: ignore[operator]
    biases = _new_biases(adapter)
    quantized = {} if into is None else _quantized_again(adapter, into, rounding, force=force)
    undo = _keep(model, state, name) if keep_base else None
    beside = _changes_beside(adapter, biases)

    sites: list[SiteMerge] = []
    biased: list[str] = []
    for path, module in tracked(adapter.modules.items(), "merging", unit="modules"):
        if path in biases and module.bias is not None:
            module.bias.copy_(biases[path])
        elif path in biases:
            module.set_bias(nn.Parameter(biases[path], requires_grad=False))
            biased.append(path)
        if _shared(adapter, path):
            continue  # a weight that modules share is merged once, at the site, and they still share it
        if path in quantized:
            merged, site = quantized[path]
        else:
            merged, site = fold(path, module.frozen, module.updates[name].factors(module.frozen))  # type: ignore[operator]
        sites.append(site)
        if merged is not module.frozen:
            module.hold(merged)
    for holder in adapter.replaced.values():
        holder.origin = holder.copy_of(name)
    unwrap(model)
    idle = not beside and not any(site.change for site in sites)
    report = MergeReport(name, tuple(sites), tuple(adapter.replaced), tuple(biased), idle, undo)
    for dtype, share in report.survival().items():
        if share < ENOUGH:
            warnings.warn(
                f"merging into {short(dtype)} kept {share:.4f} of the update (1 is all); rounding removed the rest. "
                f"Merge into {'a dense storage' if into else 'a base in float32'}, or use the adapter without merging",
                stacklevel=3,  # past the decorator
            )
    return report


def _shared(adapter: Adapter, path: str) -> bool:
    """Whether this module uses the update of a site and also has the same weight in memory."""
    if path not in adapter.tied:
        return False
    own, other = (adapter.modules[p].frozen.dense_or_none for p in (path, adapter.tied[path]))
    return own is not None and other is not None and own.data_ptr() == other.data_ptr()


def _new_biases(adapter: Adapter) -> dict[str, Tensor]:
    """The bias of each site after the merge, in the dtype that the model stores, where the adapter has its own.

    Raises ValueError if a bias overflows that dtype.
    """
    found = {}
    for path, module in adapter.modules.items():
        own = module.biases.get(adapter.name, module.bias)
        offset = module.updates[adapter.name].bias_delta()  # type: ignore[operator]
        if offset is not None:
            own = offset if own is None else own.to(torch.promote_types(own.dtype, offset.dtype)) + offset
        if own is None or own is module.bias:
            continue
        found[path] = own.detach().to(module.frozen.dtype if module.bias is None else module.bias.dtype)
        if not torch.isfinite(found[path]).all():
            raise ValueError(
                f"{path}: the merged bias overflows {short(found[path].dtype)}, so nothing was merged; merge in float32"
            )
    return found


def _changes_beside(adapter: Adapter, biases: dict[str, Tensor]) -> bool:
    """Whether the adapter's biases or its copies of whole modules differ from the base's."""
    for path, bias in biases.items():
        before = adapter.modules[path].bias
        if not torch.equal(bias, torch.zeros_like(bias) if before is None else before):
            return True
    for holder in adapter.replaced.values():
        old, new = holder.origin.state_dict(), holder.copy_of(adapter.name).state_dict()
        if old.keys() != new.keys() or not all(torch.equal(old[key], new[key]) for key in old):
            return True
    return False


def _quantized_again(adapter: Adapter, into: str, rounding: str, *, force: bool) -> dict[str, tuple[Weight, SiteMerge]]:
    """Merged weights in the storage `into`, and their reports, by site; the model is not changed."""
    problems = [
        f"{path} is {module.frozen.storage.name}"
        for path, module in adapter.modules.items()
        if module.frozen.storage.name != into
    ]
    if problems:
        raise ValueError(f"into={into!r} needs matrices stored in {into}, but {listed(problems)}; leave `into` out")
    found = {}
    for path, module in tracked(adapter.modules.items(), f"merging into {into}", unit="modules"):
        factors = module.updates[adapter.name].factors(module.frozen)  # type: ignore[operator]
        merged = module.frozen.requantize(factors, rounding)
        found[path] = merged, measured(path, module.frozen, merged, factors)
    share = survival([site for _, site in found.values()])[into]
    if share < LEAST and not force:
        how = "round with 'aware'" if rounding != "aware" else "force the merge"
        raise ValueError(
            f"merging into {into} would keep {share:.4f} of the update (1 is all), so nothing was merged; merge into "
            f"a dense storage, use the adapter without merging, or {how}"
        )
    return found


def _keep(model: nn.Module, state: AdapterState, name: str) -> _Undo:
    adapter = state.adapters[name]
    return _Undo(
        model,
        state,
        name,
        {**state.sites, **state.replaced, **({SHARED: getattr(model, SHARED)} if hasattr(model, SHARED) else {})},
        {path: module.frozen for path, module in adapter.modules.items()},
        {p: m.frozen.dense_or_none.clone() for p, m in adapter.modules.items() if m.frozen.dense_or_none is not None},
        {path: module.bias.clone() for path, module in adapter.modules.items() if module.bias is not None},
        {path: holder.origin for path, holder in adapter.replaced.items()},
    )
