"""DoRA: magnitude and direction of a matrix, apart (Liu et al. 2024, arXiv 2402.09353, §4).

    W' = m ∘ (W₀ + s B A) / ‖W₀ + s B A‖        m trained, at first ‖W₀‖, so that training starts at the base model

It is a gain in front of any low-rank update: W' = diag(g) (W₀ + ΔW) with g = m / n and n = ‖W₀ + ΔW‖ of each row. So
`DoRAUpdate` holds such an update, calls it, and scales what comes out. The bias is not scaled.

The norm needs neither ΔW nor a dense W₀ (`dora_norm.py`). It is measured once for each change of A, B or W₀: n is kept
in between, in inference and within gradient accumulation.

§4.3 holds n constant in the backward pass (`gradient="detached"`, the default of the paper's code and of PEFT);
"exact" differentiates it. `norm_axis="output"` is one magnitude for each row of W [O, I], as in the paper's code, PEFT
and all published figures; "input", the text's literal ‖·‖_c, is one for each column. An embedding's rows are vectors.
Dropout is on the low-rank branch alone, as in LoRA; the paper's code scales dropped inputs too, for which it applies W₀
twice. Rows of W₀ that are zero have no direction: there the gain is 1, which is plain LoRA.

Shapes: O out_features, I in_features, R rank, N rows of a flattened batch, L = O or I, whichever has the norms.
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
from reparam.core.registry import method
from reparam.core.versions import Stamp, Steps, stamp
from reparam.methods.dora_norm import of_columns, of_rows
from reparam.methods.full import of_matrix
from reparam.methods.lora import LoRA

GRADIENTS = ("detached", "exact")
AXES = ("output", "input")
_INNER = "low_rank."  # the names of the update underneath begin with this
_INVERTIBLE = 2.0**-10
"""Gains from here to its inverse can be divided out again without loss, in float16 too."""


@method("dora")
@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """Configuration of DoRA: LoRA's, for the direction, and how magnitudes are measured.

    Raises ValueError as LoRA does, and for an unknown gradient or norm_axis.

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
    """Whether the norm counts as a constant in the backward pass (detached), or is differentiated (exact)."""
    norm_axis: str = "output"
    """What has a magnitude: each row of W, an output feature (output), or each column (input)."""
    magnitude_only: bool = False
    """Train the magnitudes alone, without a low-rank part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if problems := wrong_words(self, {"gradient": GRADIENTS, "norm_axis": AXES}):
            raise ValueError("DoRA: " + "; ".join(problems))

    def no_components_reason(self) -> str | None:
        """Magnitudes alone have none."""
        return "it trains magnitudes alone, and nothing in it has a rank" if self.magnitude_only else None

    @property
    def magnitude_axis(self) -> Literal["output", "input"]:
        """As `norm_axis` says."""
        return "input" if self.norm_axis == "input" else "output"

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> DoRAUpdate:  # type: ignore[override]
        """Magnitudes over LoRA's fresh update."""
        return self.over(None if self.magnitude_only else super().build(site, weight, shared), site, weight)

    def over(self, low_rank: Update | None, site: Site, weight: Weight) -> DoRAUpdate:
        """Magnitudes of the base over any fresh update of low rank. Raises ValueError where a norm is not finite."""
        dim = 1 if self.norm_axis == "output" else 0
        magnitude = weight.squared_norms(dim).sqrt().float()
        if not magnitude.is_meta and not magnitude.isfinite().all():
            raise ValueError(f"DoRA: {site.name}: the norm of {int((~magnitude.isfinite()).sum())} rows is not finite")
        return DoRAUpdate(low_rank, magnitude, dim=dim, exact=self.gradient == "exact")


class _Norms(NamedTuple):
    """What holds until the parameters or W change."""

    stamp: Stamp
    steps: int
    squares: Tensor  # [L]: a new tensor whenever W is another one
    norm: Tensor  # [L]
    dead: Tensor | None  # [L], where there is no direction; None for nowhere
    gain: Tensor  # [L], detached
    invertible: bool
    ready: dict[torch.dtype, tuple[Tensor, Tensor]]
    """A [R, I] and (gain ∘ B)ᵀ [R, O], by the dtype that they are used in."""


class DoRAUpdate(Update):
    """Magnitudes over a low-rank update, or over none. The master copies are float32."""

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
        # `_modules` and not the attribute, which nn.Module looks up slowly: this runs at every site for every token.
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
            y = y.mul_(gain)  # nobody else has this y: the inner update has just made it
        else:
            # With a bias the next layer keeps the sum, so that to keep the scaled y instead of y saves nothing.
            y = _Scaled.apply(y, gain, invertible and bias is None)
        return y if bias is None else y + bias.to(y.dtype)

    def _applied(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """`forward` in inference: with all that hangs on parameters alone made before, and every step in place."""
        kept = self._norms(weight)
        rows = x.reshape(-1, weight.in_features)  # [N, I]
        y = weight(rows)
        if y.dtype not in kept.ready:
            # Out of inference mode, whose tensors could not be kept for training.
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
        """gain, A and gain ∘ B. Magnitudes of columns have no such form of low rank: ΔW itself is one factor then.

        That takes the memory of two matrices, for each adapter in a mixed batch too.
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
        """As the update underneath does."""
        if self.low_rank is not None:
            self.low_rank.fit({k.removeprefix(_INNER): t for k, t in tensors.items() if k.startswith(_INNER)})

    def low_rank_part(self) -> tuple[Update, str] | None:
        """That of the update underneath."""
        part = None if self.low_rank is None else self.low_rank.low_rank_part()
        return None if part is None else (part[0], _INNER + part[1])

    def forget(self) -> None:
        """Measure anew at the next use."""
        self._kept = None

    def train(self, mode: bool = True) -> Self:
        """Switch modes; what was kept is measured anew."""
        if mode != self.training:  # trainers call this before each micro-batch
            self.forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.forget()  # a move changes dtype or device, and what is kept does not move along
        return super()._apply(fn, recurse)

    def _low_rank_factors(self, weight: Weight) -> Factors:
        assert self.low_rank is not None
        found = self.low_rank.factors(weight)
        assert found.gain is None, "magnitudes go over a low-rank change alone"
        return found

    def _gain(self, weight: Weight) -> tuple[Tensor, bool]:
        """g [L], differentiable, and whether it can be divided out again."""
        if torch.compiler.is_compiling():  # a graph cannot tell whether what is kept still holds: measured each time
            norm, dead = self._measured(weight, weight.squared_norms(self.dim), grad=self.exact)
            return torch.where(dead, 1, self.magnitude / norm), False
        kept = self._norms(weight)
        if not torch.is_grad_enabled():
            return kept.gain, kept.invertible
        norm = self._measured(weight, kept.squares, grad=True)[0] if self.exact else kept.norm
        gain = self.magnitude / norm
        return gain if kept.dead is None else torch.where(kept.dead, 1, gain), kept.invertible

    def _norms(self, weight: Weight) -> _Norms:
        squares, now, kept = weight.squared_norms(self.dim), stamp(self), self._kept
        if kept is not None and kept.squares is squares and kept.stamp == now and kept.steps == Steps.count:
            return kept
        with torch.inference_mode(False), torch.no_grad():  # as in `_applied`
            norm, dead = self._measured(weight, squares, grad=False)
            gain = torch.where(dead, 1, self.magnitude / norm)
            size = gain.abs()
            invertible = bool(((size >= _INVERTIBLE) & (size <= 1 / _INVERTIBLE)).all())
            found = _Norms(
                now or (), Steps.count, squares, norm, dead if bool(dead.any()) else None, gain, invertible, {}
            )
        self._kept = None if now is None else found  # without a stamp, a change could not be seen
        return found

    def _measured(self, weight: Weight, squares: Tensor, *, grad: bool) -> tuple[Tensor, Tensor]:
        """n [L] in the dtype of the magnitudes, 1 where there is no direction, and where that is."""
        total = squares
        if self.low_rank is not None:
            with (
                torch.set_grad_enabled(grad and torch.is_grad_enabled()),
                torch.autocast(weight.device.type, enabled=False),  # in 16 bits the terms would not add up
            ):
                A, B, _ = self._low_rank_factors(weight)
                total = of_rows(weight, A, B, squares) if self.dim == 1 else of_columns(weight, A, B, squares)
        dead = (squares == 0) | (total <= 0)  # W₀ has no direction there, or W₀ + ΔW has none left
        return torch.where(dead, 1, total).sqrt().to(self.magnitude.dtype), dead


class _Scaled(torch.autograd.Function):
    """y [..., O], gain [O] -> y ∘ gain. What is kept for the gain's gradient is the result, where that can be undone.

    Most often the next layer keeps it as well, so that it costs nothing; y itself would be one more [N, O].
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
