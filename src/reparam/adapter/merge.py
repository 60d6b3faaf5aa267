"""Folding the active adapter into the weights: exact about what was asked, and about what rounding left of it.

One site at a time, in blocks of rows: W' = diag(gain) W + B A in float32 (a float64 base: in float64), cast once,
written over the base. Quantized matrices are dequantized on the way, into the dtype that their results have: what is
written is W as the adapter was trained on it, plus ΔW. For each site the report states which share of the update ΔW =
W' − W is
in what was written:

    survival = ⟨written − W, ΔW⟩ / ⟨ΔW, ΔW⟩        1 is everything, 0 is nothing

In bfloat16 a small update can vanish in the rounding; the report warns below 0.99. In four bits most of it does, so
that quantized matrices are quantized again only when asked for by name, and not where less than 0.9 survives.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reparam.adapter.adapter import Adapter
from reparam.adapter.attach import unwrap
from reparam.adapter.quantize import describe
from reparam.adapter.selection import AdapterState, state_of
from reparam.core.base import Factors, Weight
from reparam.core.checks import listed
from reparam.sites.module import SHARED, Adapted
from reparam.weights.dense import DenseWeight

BLOCK = 1 << 16  # elements of W in one block on a CPU: 256 KiB in float32, so that the buffers stay in a core's cache
ENOUGH = 0.99
LEAST = 0.9
"""Share of an update that must survive in a storage that is merged into."""


@dataclasses.dataclass(frozen=True)
class SiteMerge:
    """What merging did to one site."""

    name: str
    dtype: torch.dtype
    change: float
    """Frobenius norm of ΔW."""
    survival: float
    """Share of ΔW that is in what was written; 1 when ΔW is zero."""
    storage: str = "dense"
    """Name of the storage that was written."""
    noise: float | None = None
    """|written − W − ΔW| / |ΔW|, in a quantized storage: what else was written."""


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
    """What merging did, site by site; and the way back, when the base was kept."""

    adapter: str
    sites: tuple[SiteMerge, ...]
    replaced: tuple[str, ...]
    """Modules that were replaced whole by the adapter's copies."""
    biased: tuple[str, ...] = ()
    """Modules that have a bias now and had none before."""
    undo: _Undo | None = dataclasses.field(default=None, repr=False)

    def survival(self) -> dict[torch.dtype | str, float]:
        """The share of ΔW that survived over all sites of one dtype; of quantized ones, of one storage, by its name."""
        return survival(self.sites)

    def __repr__(self) -> str:
        kept = [f"{share:.4f} survives in {_short(kind)}" for kind, share in self.survival().items()]
        whole = [f"{len(self.replaced)} modules whole"] if self.replaced else []
        base = [] if self.undo is None else ["base kept"]
        return f"MergeReport({', '.join([repr(self.adapter), f'{len(self.sites)} sites', *whole, *kept, *base])})"

    @torch.no_grad()
    def restore(self) -> None:
        """Bring back the base, bit for bit, with its adapters and the choice among them.

        Raises ValueError unless the merge was made with `keep_base=True`; reload the base then.
        """
        if self.undo is None:
            raise ValueError("the base was not kept: merge with keep_base=True, or load the base model again")
        undo = self.undo
        for path, module in undo.modules.items():
            undo.model.set_submodule(path, module)
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
        shares = ", ".join(f"{share:.4f} in {_short(kind)}" for kind, share in self.survival().items())
        noise = sum((site.noise * site.change) ** 2 for site in self.sites if site.noise is not None)
        total = sum(site.change**2 for site in self.sites if site.noise is not None)
        beside = f", beside noise of {(noise / total) ** 0.5:.2f} times its size" if total else ""
        return (
            f"merged {self.adapter!r} into {len(self.sites)} sites; share of the update that was written: "
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
    """Fold the selected adapter into the model: its own modules again afterwards, and no adapters.

    Quantized matrices that the adapter goes on become dense, in the dtype of their results; those it does not go on
    stay quantized. With `into`, the name of the storage that they are in, they are quantized again instead: "nearest"
    rounds W' and loses nearly all of a small update, "aware" moves codes so that its effect stays
    (`weights/rounding.py`).

    `keep_base` copies the base first, so that the report's `restore` can bring it back.

    Raises ValueError, before anything is changed, when no single adapter is selected, a merged weight would not be
    finite, or less than `LEAST` of the update would survive in the storage `into` (unless `force`); and
    `InputDependentError` for a method whose update no one matrix stands for.
    """
    state = state_of(model)
    name = state.choice
    if not isinstance(name, str):
        raise ValueError(
            f"merge folds one adapter, and {name!r} is selected; select one of {', '.join(state.adapters)}"
        )
    adapter = state.adapters[name]
    if not adapter.modules and not adapter.replaced:
        raise ValueError(f"{adapter.method.name} changes no weight, so that there is nothing to merge")
    bad = [key for key, t in adapter.tensors().items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise ValueError(f"adapter {name!r}: NaN or infinity in {', '.join(bad[:5])}; nothing was merged")
    for path, module in adapter.modules.items():
        _check_finite(path, module.frozen, module.updates[name].factors(module.frozen))  # type: ignore[operator]
    quantized = {} if into is None else _quantized_again(adapter, into, rounding, force=force)
    undo = _keep(model, state, name) if keep_base else None

    sites, biased = [], []
    for path, module in adapter.modules.items():
        if path in quantized:
            merged, site = quantized[path]
        else:
            merged, site = fold(path, module.frozen, module.updates[name].factors(module.frozen))  # type: ignore[operator]
        sites.append(site)
        if merged is not module.frozen:
            module.hold(merged)
        if _merge_bias(module, name):
            biased.append(path)
    for holder in adapter.replaced.values():
        holder.origin = holder.copy_of(name)
    unwrap(model)
    report = MergeReport(name, tuple(sites), tuple(adapter.replaced), tuple(biased), undo)
    for dtype, share in report.survival().items():
        if share < ENOUGH:
            warnings.warn(
                f"merging into {_short(dtype)} kept {share:.4f} of the update (1 is all): the rest was rounded away. "
                f"Merge into {'a dense storage' if into else 'a base in float32'}, or keep the adapter apart",
                stacklevel=3,  # past the decorator
            )
    return report


def _merge_bias(module: Adapted, name: str) -> bool:
    """Write the bias that the adapter uses over the frozen one. Whether there was none, and is one now."""
    own = module.biases.get(name, module.bias)
    offset = module.updates[name].bias_delta()  # type: ignore[operator]
    if offset is not None:
        own = offset if own is None else own.to(torch.promote_types(own.dtype, offset.dtype)) + offset
    if own is None or own is module.bias:
        return False
    if module.bias is not None:
        module.bias.copy_(own)
        return False
    module.set_bias(nn.Parameter(own.detach().to(module.frozen.dtype), requires_grad=False))
    return True


def fold(name: str, weight: Weight, factors: Factors) -> tuple[Weight, SiteMerge]:
    """The merged weight, dense, and what became of the update. A plain `weight` is overwritten and returned."""
    plain = weight.dense_or_none
    shape = weight.out_features, weight.in_features
    out = torch.empty(shape, dtype=weight.dtype, device=weight.device) if plain is None else plain.detach()
    dtype = torch.promote_types(out.dtype, torch.float32)
    A, B = factors.A.to(dtype), factors.B.to(dtype)
    gain = None if factors.gain is None else factors.gain.to(dtype)
    size = max(1, BLOCK // out.shape[1]) if out.device.type == "cpu" else len(out)
    buffers = A.new_empty(2, size, out.shape[1])
    kept, whole = [], []
    for start in range(0, len(out), size):
        rows = slice(start, start + size)
        # `dense` is float32, which would round a base in float64.
        old = out[rows] if plain is not None and dtype != torch.float32 else weight.dense(rows).to(dtype)
        delta, new = buffers[:, : len(old)]
        torch.mm(B[rows], A, out=delta)
        if gain is not None:
            delta += (gain[rows, None] - 1) * old  # ΔW by itself: W' − W would lose digits
        torch.add(old, delta, out=new)
        if out.dtype != dtype:
            new.copy_(new.to(out.dtype))  # what will be stored, so that the report measures the rounding
        written, flat = new - old, delta.view(-1)  # before the write: old may be a view of out
        kept.append(torch.dot(written.reshape(-1), flat))
        whole.append(torch.dot(flat, flat))
        out[rows] = new
    change = float(torch.stack(whole).double().sum())  # one synchronization for all blocks
    share = float(torch.stack(kept).double().sum()) / change if change else 1.0
    merged = DenseWeight(out) if plain is None else weight
    return merged, SiteMerge(name, out.dtype, change**0.5, share)


def _quantized_again(adapter: Adapter, into: str, rounding: str, *, force: bool) -> dict[str, tuple[Weight, SiteMerge]]:
    """The merged weights in the storage that they are in, and what became of the update; nothing is changed."""
    problems = [
        f"{path} is {module.frozen.storage.name}"
        for path, module in adapter.modules.items()
        if module.frozen.storage.name != into
    ]
    if problems:
        raise ValueError(f"into={into!r} is for matrices that are in {into} now: {listed(problems)}; leave it out")
    found = {}
    for path, module in adapter.modules.items():
        factors = module.updates[adapter.name].factors(module.frozen)  # type: ignore[operator]
        merged = module.frozen.requantize(factors, rounding)
        found[path] = merged, measured(path, module.frozen, merged, factors)
    share = survival([site for _, site in found.values()])[into]
    if share < LEAST and not force:
        how = "round with 'aware'" if rounding != "aware" else "force it"
        raise ValueError(
            f"merging into {into} would keep {share:.4f} of the update (1 is all); nothing was merged. Merge into a "
            f"dense storage, keep the adapter apart, or {how}"
        )
    return found


def measured(name: str, weight: Weight, merged: Weight, factors: Factors) -> SiteMerge:
    """What of the update is in a weight that is quantized again, and what else."""
    size = max(1, (1 << 20) // weight.in_features)  # entries that are dequantized at once
    sums = torch.zeros(3, dtype=torch.float64, device=weight.device)
    for start in range(0, weight.out_features, size):
        rows = slice(start, start + size)
        old = weight.dense(rows)
        delta, written = factors.change(old, rows), merged.dense(rows) - old
        sums += torch.stack([(delta * written).sum(), delta.square().sum(), (written - delta).square().sum()])
    kept, change, noise = sums.tolist()
    if not change:
        return SiteMerge(name, weight.dtype, 0.0, 1.0, merged.storage.name, 0.0)
    return SiteMerge(name, weight.dtype, change**0.5, kept / change, merged.storage.name, (noise / change) ** 0.5)


def survival(sites: Sequence[SiteMerge]) -> dict[torch.dtype | str, float]:
    """The share of ΔW that survived over all of these sites of one dtype; of quantized ones, of one storage."""
    groups: dict[torch.dtype | str, list[SiteMerge]] = {}
    for site in sites:
        groups.setdefault(site.dtype if site.storage == "dense" else site.storage, []).append(site)
    found = {}
    for kind, members in groups.items():
        total = sum(site.change**2 for site in members)
        found[kind] = sum(site.survival * site.change**2 for site in members) / total if total else 1.0
    return found


def _check_finite(name: str, weight: Weight, factors: Factors) -> None:
    """Raise ValueError unless every entry of W' is certain to be finite: |W'| <= gain |W| + |B| |A|."""
    bound = factors.A.double().norm() * factors.B.double().norm()
    if weight.dtype == torch.float16 or factors.gain is not None:  # no W comes near the range of the wider dtypes
        gain = 1.0 if factors.gain is None else factors.gain.double().abs().max()
        bound = bound + gain * weight.dense().abs().max()
    if not bound < torch.finfo(weight.dtype).max / 2:  # half, for what rounding adds; "not <", so that NaN is refused
        raise ValueError(
            f"{name}: the merged weight would not be finite in {_short(weight.dtype)} (the update's size is "
            f"{float(bound):.3g}); nothing was merged. Check the adapter for NaN, or merge in float32"
        )


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


def _short(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
