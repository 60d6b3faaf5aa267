"""DoRA: trains the magnitude and the direction of a weight matrix separately (Liu et al. 2024, arXiv 2402.09353, §4).

    W' = m ∘ (W₀ + s B A) / ‖W₀ + s B A‖        m trains and starts at ‖W₀‖, so that training starts at the base model

DoRA is a gain on top of a low-rank update: W' = diag(g) (W₀ + ΔW) with g = m / n, where n [O] holds the norms of the
rows of W₀ + ΔW. `DoRAUpdate` holds any low-rank update, calls it and scales its output. The bias is not scaled.

`dora_norm.py` computes n without building ΔW or a dense W₀. n is cached until A, B or W₀ changes, so that inference and
gradient accumulation do not compute it again. At each forward the bytes of A, B and m are compared with those that n
was computed from, and a sample of W₀ (`core/versions.py`); in the steps of a generation only torch's counts of writes.

§4.3 of the paper treats n as a constant in the backward pass (`gradient="detached"`, the default, also of the paper's
code and of PEFT); "exact" differentiates it. `norm_axis="output"` gives each row of W [O, I] a magnitude, as in the
paper's code, PEFT and all published results; "input", the paper's literal ‖·‖_c, gives each column one. A row of an
embedding is the vector of one token. Dropout applies to the low-rank branch only, as in LoRA; the paper's code also
scales W₀ applied to the dropped input, which costs a second product with W₀. A zero row of W₀ has no direction: its
gain is 1, which is plain LoRA.

Shapes: O out_features, I in_features, R rank, N rows of a flattened batch, L the number of norms (O or I).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.base import Factors, Role, Site, Update, Weight
from reparam.core.checks import wrong_words
from reparam.core.continuing import trusted
from reparam.core.dtypes import holds
from reparam.core.registry import method
from reparam.core.versions import Stamp, content, stamp_of, tensors_of
from reparam.methods.dora_norm import of_columns, of_rows
from reparam.methods.full import of_matrix
from reparam.methods.lora import LoRA

GRADIENTS = ("detached", "exact")
AXES = ("output", "input")
_INNER = "low_rank."  # prefix of the inner update's tensor names
_INVERTIBLE = 2.0**-10
"""Gains between this size and its inverse can be divided out of an output again without loss, also in float16."""


@method("dora")
@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """DoRA (Liu et al. 2024, arXiv 2402.09353): trains LoRA's update and the magnitudes of the weight's rows.

    Raises ValueError for the same settings as LoRA, for an unknown gradient or norm_axis, and, when it is attached, for
    a base weight whose norms are not finite.

    >>> from reparam import DoRA, attach
    >>> [tuple(p.shape) for p in attach(nn.Sequential(nn.Linear(8, 6)), DoRA(r=2), targets="0").parameters()]
    [(6,), (2, 8), (6, 2)]
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"r": 4, "alpha": 8},
        {"r": 4, "alpha": 4, "scaling": "rslora", "dropout": 0.1, "gradient": "exact", "rank_pattern": {"q_proj": 2}},
        {"r": 2, "alpha": 4, "norm_axis": "input"},
        {"magnitude_only": True},
    )

    gradient: str = "detached"
    """Backward pass through the norm: detached treats it as a constant, exact differentiates it."""
    norm_axis: str = "output"
    """One magnitude for each row of W, an output feature (output), or for each column, an input feature (input)."""
    magnitude_only: bool = False
    """Train only the magnitudes, without a low-rank update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if problems := wrong_words(self, {"gradient": GRADIENTS, "norm_axis": AXES}):
            raise ValueError("DoRA: " + "; ".join(problems))

    def no_components_reason(self) -> str | None:
        """The reason if `magnitude_only` is set: magnitudes have no rank components."""
        return "it trains only magnitudes (magnitude_only), which have no rank" if self.magnitude_only else None

    @property
    def magnitude_axis(self) -> Literal["output", "input"]:
        """The setting `norm_axis`: "output" or "input"."""
        return "input" if self.norm_axis == "input" else "output"

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> DoRAUpdate:  # type: ignore[override]
        """A new update: magnitudes that start at the norms of W₀, over a new LoRA update unless `magnitude_only`."""
        return self.over(None if self.magnitude_only else super().build(site, weight, shared), site, weight)

    def over(self, low_rank: Update | None, site: Site, weight: Weight) -> DoRAUpdate:
        """Put magnitudes, which start at the norms of W₀, on a new low-rank update or on none.

        Raises ValueError if a norm of W₀ is not finite.
        """
        dim = 1 if self.norm_axis == "output" else 0
        magnitude = weight.squared_norms(dim).sqrt().float()
        if not magnitude.is_meta and not magnitude.isfinite().all():
            raise ValueError(
                f"DoRA: {site.name}: {int((~magnitude.isfinite()).sum())} {'rows' if dim == 1 else 'columns'} of the "
                f"base weight have a norm that is not finite; check the base model for NaN and infinite weights"
            )
        return DoRAUpdate(low_rank, magnitude, dim=dim, exact=self.gradient == "exact")


class _Norms(NamedTuple):
    """Norms and gains, cached until the parameters or W change."""

    stamp: Stamp
    content: tuple[int, ...]
    squares: Tensor  # [L], ‖W₀‖²; a different tensor object once W has changed
    norm: Tensor  # [L]
    dead: Tensor | None  # [L] bool, rows or columns without a direction; None if there are none
    gain: Tensor  # [L], detached
    invertible: bool  # whether the gain can be divided out of an output again
    ready: dict[torch.dtype, tuple[Tensor, Tensor]]
    """A [R, I] and (gain ∘ B)ᵀ [R, O] by compute dtype, for inference."""


class DoRAUpdate(Update):
    """Magnitudes on top of a low-rank update, or alone. Parameters are float32 master weights."""

    caches = True

    def __init__(self, low_rank: Update | None, magnitude: Tensor, *, dim: int, exact: bool) -> None:
        super().__init__()
        self.low_rank = low_rank
        self.magnitude = nn.Parameter(magnitude)  # [L]
        inner: Mapping[str, Role] = {} if low_rank is None else low_rank.roles
        self.roles = {**{_INNER + name: role for name, role in inner.items()}, "magnitude": "gain"}  # type: ignore[misc]
        self.dim = dim
        self.exact = exact
        self._kept: _Norms | None = None

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x W'ᵀ + bias [..., O]."""
        quiet = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        # Reads `_modules`, because attribute lookup in nn.Module is slow and this runs at every site for every token.
        if quiet and self.dim == 1 and self._modules.get("low_rank") is not None:
            return self._applied(x, weight, bias)
        gain, invertible = self._gain(weight)
        inner = weight if self.low_rank is None else self.low_rank
        rest = () if self.low_rank is None else (weight,)
        if self.dim == 0:
            return inner((x * gain).to(x.dtype), *rest, bias)
        y = inner(x, *rest)
        if torch.compiler.is_compiling():
            y = (y * gain).to(y.dtype)
        elif not torch.is_grad_enabled():
            y = y.mul_(gain)  # in place is safe, because y has just been created
        else:
            # With a bias the next layer saves the sum, so that saving the scaled y instead of y would free no memory.
            y = _Scaled.apply(y, gain, invertible and bias is None)
        return y if bias is None else y + bias.to(y.dtype)

    def _applied(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """`forward` in inference, with cached gains and factors and every step in place."""
        kept = self._norms(weight)
        rows = x.reshape(-1, weight.in_features)  # [N, I]
        y = weight(rows)
        if y.dtype not in kept.ready:
            # Outside of inference mode, because its tensors could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                A, B, _ = self._low_rank_factors(weight)
                kept.ready[y.dtype] = A.detach().to(y.dtype), (kept.gain[:, None] * B).t().to(y.dtype)
        A, B_t = kept.ready[y.dtype]
        y.mul_(kept.gain).addmm_(F.linear(A, rows).t(), B_t)
        y = y if bias is None else y.add_(bias)
        return y.view(*x.shape[:-1], weight.out_features)

    def rows(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids [...] -> rows of W' [..., I]."""
        gain, _ = self._gain(weight)
        y = weight.rows(ids) if self.low_rank is None else self.low_rank.rows(ids, weight)
        return (y * (gain[ids].unsqueeze(-1) if self.dim == 1 else gain)).to(y.dtype)

    def factors(self, weight: Weight) -> Factors:
        """A [R, I], gain ∘ B [O, R] and gain [O].

        With norm_axis="input" the change has no low-rank form: one factor is the whole ΔW [O, I] and the other an
        identity. They take the memory of two matrices; a mixed batch keeps only the first one.
        """
        gain, _ = self._gain(weight)
        if self.low_rank is None:
            A, B = gain.new_zeros(0, weight.in_features), gain.new_zeros(weight.out_features, 0)
        else:
            A, B, _ = self._low_rank_factors(weight)
        if self.dim == 1:
            return Factors(A, gain[:, None] * B, gain)
        W = weight.dense() if weight.dense_or_none is None else weight.dense_or_none
        change = W.to(gain.dtype) * (gain - 1) + B @ (A * gain)  # [O, I]
        return of_matrix(change)

    def fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the inner update the shapes of its saved tensors."""
        if self.low_rank is not None:
            self.low_rank.fit({k.removeprefix(_INNER): t for k, t in tensors.items() if k.startswith(_INNER)})

    def low_rank_part(self) -> tuple[Update, str] | None:
        """The low-rank part of the inner update and the prefix of its tensor names; None for magnitudes alone."""
        part = None if self.low_rank is None else self.low_rank.low_rank_part()
        return None if part is None else (part[0], _INNER + part[1])

    def forget(self) -> None:
        """Discard the cached norms and gains."""
        self._kept = None

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; a change of mode discards the cached norms and gains."""
        if mode != self.training:  # trainers call train() before each micro-batch
            self.forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.forget()  # the cache does not move to the new dtype or device
        return super()._apply(fn, recurse)

    def _low_rank_factors(self, weight: Weight) -> Factors:
        assert self.low_rank is not None
        found = self.low_rank.factors(weight)
        assert found.gain is None, "the inner update of DoRA must be a low-rank change without a gain"
        return found

    def _gain(self, weight: Weight) -> tuple[Tensor, bool]:
        """The gain g [L], differentiable, and whether it can be divided out of an output again."""
        if torch.compiler.is_compiling():  # a graph cannot check whether the cache is still valid
            norm, dead = self._measured(weight, weight.squared_norms(self.dim), grad=self.exact)
            return torch.where(dead, 1, self.magnitude / norm), False
        kept = self._norms(weight)
        if not torch.is_grad_enabled():
            return kept.gain, kept.invertible
        norm = self._measured(weight, kept.squares, grad=True)[0] if self.exact else kept.norm
        gain = self.magnitude / norm
        return gain if kept.dead is None else torch.where(kept.dead, 1, gain), kept.invertible

    def _norms(self, weight: Weight) -> _Norms:
        squares, kept, own = weight.squared_norms(self.dim), self._kept, tensors_of(self)
        now = stamp_of(own)
        same = kept is not None and kept.squares is squares and kept.stamp == now
        if kept is not None and same and (trusted() or kept.content == content(own)):
            return kept
        held = content(own)
        with torch.inference_mode(False), torch.no_grad():  # as in `_applied`
            norm, dead = self._measured(weight, squares, grad=False)
            gain = torch.where(dead, 1, self.magnitude / norm)
            size = gain.abs()
            invertible = holds(((size >= _INVERTIBLE) & (size <= 1 / _INVERTIBLE)).all(), unknown=True)
            lifeless = dead if holds(dead.any(), unknown=False) else None
            found = _Norms(now or (), held or (), squares, norm, lifeless, gain, invertible, {})
        self._kept = None if now is None or held is None else found  # otherwise a later change could not be detected
        return found

    def _measured(self, weight: Weight, squares: Tensor, *, grad: bool) -> tuple[Tensor, Tensor]:
        """The norms n [L] in the magnitudes' dtype, 1 where there is no direction, and a mask [L] of those places."""
        total = squares
        if self.low_rank is not None:
            with (
                torch.set_grad_enabled(grad and torch.is_grad_enabled()),
                torch.autocast(weight.device.type, enabled=False),  # in 16 bits the sum would be too inexact
            ):
                A, B, _ = self._low_rank_factors(weight)
                total = of_rows(weight, A, B, squares) if self.dim == 1 else of_columns(weight, A, B, squares)
        dead = (squares == 0) | (total <= 0)  # W₀ or W₀ + ΔW has no direction there
        return torch.where(dead, 1, total).sqrt().to(self.magnitude.dtype), dead


class _Scaled(torch.autograd.Function):
    """y [..., O], gain [O] -> y ∘ gain. If the gain can be divided out again, the backward pass uses the result, not y.

    The next layer usually saves the result too, so that it costs no memory; saving y would cost another [N, O].
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor, invertible: bool) -> Tensor:
        ctx.invertible = invertible
        out = (y * gain).to(y.dtype)
        kept = out if invertible else y
        ctx.save_for_backward(kept if ctx.needs_input_grad[1] else None, gain)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        kept, gain = ctx.saved_tensors
        g_y = (g * gain).to(g.dtype) if ctx.needs_input_grad[0] else None
        g_gain = None
        if ctx.needs_input_grad[1]:
            g_gain = (g * kept).reshape(-1, len(gain)).sum(0, dtype=gain.dtype)
            g_gain = g_gain / gain if ctx.invertible else g_gain
        return g_y, g_gain, None
