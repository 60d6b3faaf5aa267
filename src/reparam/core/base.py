"""The nouns everything else is written in: a frozen weight, a site, and the trainable update that goes on it.

A linear map W [O, I] stays frozen (`Weight`, quantized by a `Storage`); an `Update` owns the few parameters that change
it. A `Method` (`core/method.py`) builds one update for each `Site`. What can be merged reduces to `Factors`:

    W' = diag(gain) · W + B · A

Shapes: O out_features, I in_features, R rank, V rows of an embedding, n length of a vector.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from reparam.core.dtypes import wide
from reparam.core.versions import Stamp, stamp

Role = Literal["in", "out", "core", "gain", "route"]
Kind = str  # the name of a kind of site, such as "linear"; `sites.kinds` registers them
_BLOCK = 1 << 18  # entries of W that are read at once: 1 MiB in float32


class Factors(NamedTuple):
    """The normal form of a change: `W' = diag(gain) · W + B · A`, with no gain meaning ones. Differentiable."""

    A: Tensor  # [R, I]
    B: Tensor  # [O, R]
    gain: Tensor | None = None  # [O]

    def apply(self, w: Tensor) -> Tensor:
        """The changed matrix [O, I], in the dtype of `w` [O, I]."""
        kept = w if self.gain is None else self.gain.to(w.dtype)[:, None] * w
        return torch.addmm(kept, self.B.to(w.dtype), self.A.to(w.dtype))

    def change(self, w: Tensor, rows: slice = slice(None)) -> Tensor:
        """ΔW [rows, I] in the dtype of `w`, which is W[rows]."""
        low_rank = self.B[rows].to(w.dtype) @ self.A.to(w.dtype)
        return low_rank if self.gain is None else torch.addcmul(low_rank, self.gain[rows, None].to(w.dtype) - 1, w)

    def low_rank_norm(self) -> float:
        """Frobenius norm of B·A from two [R, R] products, in float64; the matrix [O, I] is never built."""
        a, b = self.A.detach().double(), self.B.detach().double()
        return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


class Weight(nn.Module):
    """How a frozen matrix W [O, I] is stored. An operator first, a matrix only on request.

    A subclass keeps its tensors as parameters or buffers and implements the methods below; its `Storage` makes it.
    Nothing in it trains.
    """

    out_features: int
    in_features: int

    @property
    def storage(self) -> Storage:
        """The configuration that makes more weights like this one."""
        raise NotImplementedError

    @property
    def dense_or_none(self) -> Tensor | None:
        """The stored matrix [O, I] itself, where there is one that may be written to; None for a quantized storage."""
        return None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias [..., O]; differentiable in x."""
        raise NotImplementedError

    def cast(self, x: Tensor) -> Tensor:
        """x in a dtype that `forward` and an update beside it can use; by default as it is."""
        return x

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...] of integers below O -> the rows W[ids], [..., I]."""
        raise NotImplementedError

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """A block of rows of W as float32, [rows, I]. It may be a view of the storage: do not write to it."""
        raise NotImplementedError

    def tensor(self) -> Tensor:
        """W [O, I] in `dtype`: the stored tensor itself where it is plain, else a new one."""
        return self.dense().to(self.dtype) if self.dense_or_none is None else self.dense_or_none

    def squared_norms(self, dim: int) -> Tensor:
        """The sum of squares of each row (dim=1, [O]) or column (dim=0, [I]) of W, in float64.

        Kept until W changes, but not in a compiled graph, which cannot tell. W is read in blocks of rows.
        """
        kept: dict[int, tuple[Stamp, Tensor]] = self.__dict__.setdefault("_squared_norms", {})
        eager = not torch.compiler.is_compiling()
        now = self.stamp() if eager else None
        if now is not None and dim in kept and kept[dim][0] == now:
            return kept[dim][1]
        with torch.inference_mode(False) if eager else contextlib.nullcontext(), torch.no_grad():
            found = [block.double().square().sum(dim) for _, block in self.blocks()]
            total = torch.cat(found) if dim == 1 else torch.stack(found).sum(0)
        if now is not None:
            kept[dim] = now, total
        return total

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """W in blocks of rows [rows, I]: as it is stored where it is plain, else in float32."""
        size = max(1, _BLOCK // self.in_features)
        for start in range(0, self.out_features, size):
            rows = slice(start, start + size)
            yield rows, self.dense(rows) if self.dense_or_none is None else self.dense_or_none.detach()[rows]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.__dict__.pop("_squared_norms", None)  # a move through 16 bits and back can end at the same address
        return super()._apply(fn, recurse)

    def requantize(self, factors: Factors, rounding: str) -> Weight:
        """W' in the same format; `rounding` is "nearest", or "aware", which keeps the update's effect where it can.

        Raises ValueError where the format has no such operation.
        """
        raise ValueError(f"no merge into the storage {self.storage.name!r} itself is defined; merge into a dense one")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that results have."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return next(iter(self.held())).device

    def stamp(self) -> Stamp | None:
        """What changes when the matrix is written to or exchanged, see `stamp` of `core/versions.py`."""
        return stamp(self)

    def held(self) -> Iterable[Tensor]:
        """The tensors that the matrix is stored in: by default all parameters and buffers."""
        return (*self.parameters(), *self.buffers())


@dataclasses.dataclass(frozen=True)
class Storage:
    """Configuration and factory of a weight: a frozen dataclass whose `__post_init__` refuses bad values.

    A subclass is registered with `@storage("name")`, lists in `examples` the settings that the conformance suite
    builds, and implements `quantize`.
    """

    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def quantize(self, w: Tensor) -> Weight:
        """Store `w` [O, I], of any floating dtype. Raises ValueError for values that the format cannot hold."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The fields as plain JSON values; `STORAGES[name](**settings)` gives an equal storage."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Site:
    """One place in a model where an update can go."""

    name: str
    """Path of the module in the model, as `named_modules` gives it."""
    kind: Kind
    """An embedding is a matrix too: a row per id, O = V rows of I = width. So is a vector, a norm's: [O = n, I = 1]."""
    out_features: int
    in_features: int
    transposed: bool = False
    """Whether the base keeps this matrix as [I, O], as GPT-2's Conv1D does. Only other libraries' files need it."""
    bias: bool = False
    """Whether the module has a bias [O]; not known of sites that were read from a file."""


class ExpertChoice(Protocol):
    """How the update of one site divides its input among experts. What sites decide together has one `scope`."""

    @property
    def scope(self) -> str:
        """Path of the module, layer or block whose sites decide together; "" for the whole model."""

    @property
    def leads(self) -> bool:
        """Whether this site is the first of its scope, which decides for the others."""

    @property
    def experts(self) -> int:
        """N, their number."""

    def decided(self, x: Tensor, weight: Weight) -> tuple[Tensor, Tensor] | None:
        """What the update decides for its input x [..., I] in the current forward, token by token without padding.

        That is where an expert counts as selected, bool, and its probability, both [T, N]; None where it is not asked.
        """

    def products(self) -> Tensor:
        """The inner products of the experts' changes, [N, N], in float64."""


class Update(nn.Module):
    """The trainable part of one site. It decides itself when the frozen map is applied.

    `roles` gives every parameter its part ("in": what meets the input first, "out": what makes the output, "core",
    "gain", "route"). Optimizer groups, weight decay and files go by roles, never by parts of names.
    """

    roles: ClassVar[Mapping[str, Role]] = {}

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x W'ᵀ + bias [..., O]. The bias is never scaled."""
        raise NotImplementedError

    def factors(self, weight: Weight) -> Factors:
        """The normal form, differentiable in the parameters. Raises `InputDependentError` where there is none."""
        raise NotImplementedError

    def bias_delta(self) -> Tensor | None:
        """The change of the bias [O], differentiable, or None. `forward` adds it, to the bias that it is given."""
        return None

    def effective_weight(self, weight: Weight) -> Tensor:
        """W' [O, I] in float32 or more, differentiable. Sites that are vectors compute with it."""
        return self.factors(weight).apply(wide(weight.tensor()))

    def rows(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids [...] -> rows of W', [..., I], for embeddings: `gain[i] · W[i] + B[i] · A`."""
        factors = self.factors(weight)
        found = weight.rows(ids)
        if factors.gain is not None:
            found = found * factors.gain.to(found.dtype)[ids].unsqueeze(-1)
        return found + (nn.functional.embedding(ids, factors.B) @ factors.A).to(found.dtype)

    def fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Take on the shapes of these saved tensors, where training makes parameters smaller; others stay."""

    def penalty(self) -> Tensor | None:
        """An extra loss (a scalar), or None."""
        return None

    def low_rank_part(self) -> tuple[Update, str] | None:
        """The update inside that is a plain change B A, and what the names of its tensors begin with here; or None."""
        return None

    def from_svd(self, u: Tensor, s: Tensor, vh: Tensor) -> dict[str, Tensor]:
        """Its parameters by name with which its change is U diag(s) Vh: u [O, R], s [R], vh [R, I].

        Asked of a `low_rank_part`.
        """
        raise NotImplementedError

    def expert_choice(self) -> ExpertChoice | None:
        """How it divides its input among experts; None for an update without experts."""
        return None
