"""The base classes: a frozen weight, a site in a model, and the trainable update at that site.

A linear map W [O, I] stays frozen (`Weight`, made by a `Storage`); an `Update` owns the few parameters that change it.
A `Method` (`core/method.py`) builds one update for each `Site`. Every update that can be merged has `Factors`:

    W' = diag(gain) · W + B · A

Shapes: O out_features, I in_features, R rank, V rows of an embedding, n length of a vector.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from reparam.core.continuing import trusted
from reparam.core.dtypes import wide
from reparam.core.placing import Stays
from reparam.core.plain import wrong_types
from reparam.core.versions import Stamp, sample, stamp_of, tensors_of

Role = Literal["in", "out", "core", "gain", "route"]
Kind = str  # the name of a kind of site, such as "linear"; `sites.kinds` registers them
_BLOCK = 1 << 18  # entries of W read at a time: 1 MiB in float32


class Factors(NamedTuple):
    """The normal form of an update, `W' = diag(gain) · W + B · A`; `gain=None` means all ones. Differentiable."""

    A: Tensor  # [R, I]
    B: Tensor  # [O, R]
    gain: Tensor | None = None  # [O]

    def apply(self, w: Tensor) -> Tensor:
        """The changed matrix [O, I], in the dtype of `w` [O, I]."""
        kept = w if self.gain is None else self.gain.to(w.dtype)[:, None] * w
        return torch.addmm(kept, self.B.to(w.dtype), self.A.to(w.dtype))

    def change(self, w: Tensor, rows: slice = slice(None)) -> Tensor:
        """ΔW[rows] [rows, I] in the dtype of `w`; pass `w` = W[rows]."""
        low_rank = self.B[rows].to(w.dtype) @ self.A.to(w.dtype)
        return low_rank if self.gain is None else torch.addcmul(low_rank, self.gain[rows, None].to(w.dtype) - 1, w)

    def low_rank_norm(self) -> float:
        """The Frobenius norm of B·A in float64, from two [R, R] products, without building the [O, I] matrix."""
        a, b = self.A.detach().double(), self.B.detach().double()
        return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


class Weight(nn.Module):
    """A frozen matrix W [O, I] in some storage format. `forward` applies it without building the matrix.

    A subclass keeps its tensors as parameters or buffers and implements the methods below; its `Storage` creates it.
    None of its tensors is trained.
    """

    out_features: int
    in_features: int

    @property
    def storage(self) -> Storage:
        """The configuration that creates weights in this format."""
        raise NotImplementedError

    @property
    def dense_or_none(self) -> Tensor | None:
        """The stored matrix [O, I] itself, which may be written to; None if the storage is quantized."""
        return None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias [..., O]; differentiable in x."""
        raise NotImplementedError

    def cast(self, x: Tensor) -> Tensor:
        """x in a dtype that both `forward` and the update accept; by default x unchanged."""
        return x

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...], integers from 0 to O - 1 -> the rows W[ids] [..., I]."""
        raise NotImplementedError

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """These rows of W in float32 [rows, I]. The result may be a view of the stored matrix: do not write to it."""
        raise NotImplementedError

    def tensor(self) -> Tensor:
        """W [O, I] in `dtype`: the stored tensor itself if the storage is dense, otherwise a new tensor."""
        return self.dense().to(self.dtype) if self.dense_or_none is None else self.dense_or_none

    def write(self, out: Tensor, start: int = 0) -> None:
        """Write the rows W[start : start + rows] into `out` [rows, I], which is contiguous, in its dtype."""
        out.copy_(self.dense(slice(start, start + len(out))))

    def squared_norms(self, dim: int) -> Tensor:
        """The sum of squares of each row (dim=1, [O]) or column (dim=0, [I]) of W, in float64.

        Cached until W changes, except in a compiled graph, which cannot detect a change. W is read in blocks of rows.
        A write that torch does not count is seen if it changes one of the elements in a sample (`core/versions.py`).
        """
        kept: dict[int, tuple[Stamp, tuple[int, ...], Tensor]] = self.__dict__.setdefault("_squared_norms", {})
        eager = not torch.compiler.is_compiling()
        held = self.held()
        now = stamp_of(held) if eager else None
        same = now is not None and dim in kept and kept[dim][0] == now
        if same and (trusted() or kept[dim][1] == sample(held)):
            return kept[dim][2]
        some = None if now is None else sample(held)
        with torch.inference_mode(False) if eager else contextlib.nullcontext(), torch.no_grad():
            found = [block.double().square().sum(dim) for _, block in self.blocks()]
            total = torch.cat(found) if dim == 1 else torch.stack(found).sum(0)
        if now is not None and some is not None:
            kept[dim] = now, some, total
        return total

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """W in blocks of rows [rows, I]: in its own dtype if the storage is dense, otherwise in float32."""
        size = max(1, _BLOCK // self.in_features)
        for start in range(0, self.out_features, size):
            rows = slice(start, start + size)
            yield rows, self.dense(rows) if self.dense_or_none is None else self.dense_or_none.detach()[rows]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.__dict__.pop("_squared_norms", None)  # a cast to 16 bits and back can reuse the same address
        return super()._apply(fn, recurse)

    def requantize(self, factors: Factors, rounding: str) -> Weight:
        """W' in the same format.

        `rounding` is "nearest", or "aware", which chooses the codes so that the update keeps as much of its effect as
        possible. Raises ValueError if the format does not implement this.
        """
        raise ValueError(f"storage {self.storage.name!r} does not support merging; merge into a dense weight instead")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the results."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of the stored tensors."""
        return self.held()[0].device

    def held(self) -> tuple[Tensor, ...]:
        """The tensors that store the matrix: by default all parameters and buffers."""
        return tuple(tensors_of(self))


@dataclasses.dataclass(frozen=True)
class Storage:
    """Configuration and factory of a weight format: a frozen dataclass whose `__post_init__` rejects bad values.

    A subclass is registered with `@storage("name")`, lists in `examples` the settings that the conformance suite
    builds, and implements `quantize`.
    """

    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def __post_init__(self) -> None:
        """Raise ValueError for settings of a wrong type. A subclass with checks of its own calls this first."""
        if problems := wrong_types(self):
            raise ValueError(f"{self.name}: {'; '.join(problems)}")

    def quantize(self, w: Tensor) -> Weight:
        """Store `w` [O, I], of any floating-point dtype. Raises ValueError for values that the format cannot hold."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The fields as plain JSON values; `STORAGES[name](**settings)` gives an equal storage."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Site:
    """A place in a model where an update can be attached: one matrix and its bias."""

    name: str
    """Path of the module in the model, as `named_modules` gives it."""
    kind: Kind
    """Kind of the module. A linear map has W [O, I]; an embedding has one row per id, O = V and I = its width; a norm's
    weight [n] is a "vector", a matrix with O = n and I = 1."""
    out_features: int
    in_features: int
    transposed: bool = False
    """Whether the base model stores the matrix as [I, O], like GPT-2's Conv1D. Only other libraries' files use it."""
    bias: bool = False
    """Whether the module has a bias [O]. It is False, meaning unknown, for sites that were read from a file."""


class ExpertChoice(Protocol):
    """How the update of one site routes its input to experts. Sites that share a decision have the same `scope`."""

    @property
    def scope(self) -> str:
        """Path of the module, layer or block whose sites share one decision; "" for the whole model."""

    @property
    def leads(self) -> bool:
        """Whether this site is the first of its scope and makes the decision for the others."""

    @property
    def experts(self) -> int:
        """The number of experts, N."""

    def decided(self, x: Tensor, weight: Weight) -> tuple[Tensor, Tensor] | None:
        """The routing decision for the input x [..., I] of the current forward, for the T tokens that are not padding.

        Returns which experts are selected (bool) and their probabilities, both [T, N], or None if the router does not
        run in this forward.
        """

    def products(self) -> Tensor:
        """The inner products of the experts' weight changes [N, N] in float64."""


class Update(Stays):
    """The trainable part of one site. Its `forward` calls the frozen map itself.

    `roles` gives each parameter a role: "in" (applied to the input, LoRA's A), "out" (produces the output, LoRA's B),
    "core", "gain" or "route". Optimizer groups, weight decay and files use roles, never parts of parameter names.
    """

    roles: ClassVar[Mapping[str, Role]] = {}
    caches: ClassVar[bool] = False
    """Whether `forward` uses values cached from earlier calls, and compares at each call what they depend on."""

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x W'ᵀ + bias [..., O]. The bias is never scaled."""
        raise NotImplementedError

    def factors(self, weight: Weight) -> Factors:
        """The normal form, differentiable in the parameters. Raises `InputDependentError` if there is none."""
        raise NotImplementedError

    def bias_delta(self) -> Tensor | None:
        """The change of the bias [O], differentiable, or None. `forward` adds it to its argument `bias`."""
        return None

    def effective_weight(self, weight: Weight) -> Tensor:
        """W' [O, I] in float32 or wider, differentiable. Norm sites compute their output with it."""
        return self.factors(weight).apply(wide(weight.tensor()))

    def rows(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids [...] -> rows of W', [..., I], for embeddings: `gain[i] · W[i] + B[i] · A`."""
        factors = self.factors(weight)
        found = weight.rows(ids)
        if factors.gain is not None:
            found = found * factors.gain.to(found.dtype)[ids].unsqueeze(-1)
        return found + (nn.functional.embedding(ids, factors.B) @ factors.A).to(found.dtype)

    def fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Resize parameters to the shapes of these saved tensors, in methods whose parameters shrink in training."""

    def product(self) -> tuple[Tensor, Tensor, float] | None:
        """A [R, I], B [O, R] and s, if `forward` computes x Wᵀ + s (x Aᵀ) Bᵀ in this call and nothing else; or None.

        Experts of a Mixture-of-Experts model then compute all their products in one op.
        """
        return None

    def penalty(self) -> Tensor | None:
        """An extra loss (a scalar), or None."""
        return None

    def low_rank_part(self) -> tuple[Update, str] | None:
        """The inner update whose change is B A, and the prefix of its tensors' names in this update; or None."""
        return None

    def from_svd(self, u: Tensor, s: Tensor, vh: Tensor) -> dict[str, Tensor]:
        """Parameters, by name, that make the change equal U diag(s) Vh: u [O, R], s [R], vh [R, I].

        Only called on a `low_rank_part`.
        """
        raise NotImplementedError

    def expert_choice(self) -> ExpertChoice | None:
        """How the update routes its input to experts; None if it has no experts."""
        return None
