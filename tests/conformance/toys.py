"""A storage, a method and a kind of site for the tests, written as a user would write them.

They use what LoRA and the dense storage do not: quantized integers with statistics that `.to(bfloat16)` must not
round, state that all sites share, a controller, a penalty, a saved buffer, and (on request) an update that depends on
its input. `registered` registers one for the length of a test.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.core.base import Factors, Role, Site, Storage, Update, Weight
from reparam.core.method import Method
from reparam.core.registry import METHODS, STORAGES
from reparam.errors import InputDependentError
from reparam.sites.kinds import KINDS
from reparam.sites.module import Adapted


@dataclasses.dataclass(frozen=True)
class Fixed16(Storage):
    """Toy storage: 16-bit integers, 32767 steps per row."""

    def quantize(self, w: Tensor) -> "Fixed16Weight":
        """Round `w` [O, I]."""
        scale = w.detach().float().abs().amax(1).clamp(min=1e-30) / 32767  # [O]
        return Fixed16Weight((w.detach().float() / scale[:, None]).round().to(torch.int16), scale, w.dtype)


class Fixed16Weight(Weight):
    """W as 16-bit whole numbers, with one scale for each row as the bits of a float32."""

    like: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)  # follows `model.to(dtype)`
        self.codes = nn.Parameter(codes, requires_grad=False)  # [O, I] int16
        self.scale = nn.Parameter(scale.view(torch.int32), requires_grad=False)  # [O]
        self.out_features, self.in_features = codes.shape

    @property
    def storage(self) -> Fixed16:
        """`Fixed16()`."""
        return Fixed16()

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """W in float32: the codes times the scales."""
        return self.codes[rows].float() * self.scale[rows].view(torch.float32)[:, None]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias, through the dense matrix."""
        return F.linear(x, self.dense().to(x.dtype), bias)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows W[ids], in the weight's dtype."""
        return F.embedding(ids, self.dense()).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix that was quantized, or the one that the model was moved to."""
        return self.like.dtype


@dataclasses.dataclass(frozen=True)
class Nudge(Method):
    """W' = diag(1 + gain) W + b (a + common): one rank, one row vector that all sites of equal width share."""

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"routed": True})

    strength: float = 1.0
    """Factor of the low-rank part."""
    price: float = 0.0
    """Factor of the penalty, the sum of b²."""
    routed: bool = False
    """Scale the change by a gate that looks at the input, so that no one matrix stands for it."""

    def shared(self, sites: list[Site]) -> nn.Module:
        """The shared state: one row vector for each input width."""
        widths = sorted({site.in_features for site in sites})
        return nn.ParameterDict({f"width{width}": nn.Parameter(torch.full((1, width), 0.1)) for width in widths})

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        """Build the update; its output side is zero, so that nothing changes at first."""
        assert shared is not None
        return NudgeUpdate(site, shared, self)

    def controller(self, updates: Mapping[str, Update]) -> "Counter":
        """A controller that counts optimizer steps."""
        return Counter(updates)


class NudgeUpdate(Update):
    """One site of `Nudge`."""

    roles: ClassVar[Mapping[str, Role]] = {"a": "in", "b": "out", "gain": "gain"}
    steps: Tensor

    def __init__(self, site: Site, shared: nn.Module, method: Nudge) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.linspace(-1, 1, site.in_features)[None])  # [1, I]
        self.b = nn.Parameter(torch.zeros(site.out_features, 1))  # [O, 1]
        self.gain = nn.Parameter(torch.zeros(site.out_features))  # [O]
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # number of training steps; saved
        self.method = method
        self.owner = (shared,)  # in a tuple, so that it is not a submodule: the model's root owns it

    def factors(self, weight: Weight) -> Factors:
        """The normal form; InputDependentError if the gate depends on the input."""
        if self.method.routed:
            raise InputDependentError("Nudge(routed=True) scales its change by the input")
        common = self.owner[0][f"width{weight.in_features}"]  # type: ignore[index]
        return Factors(self.a + common, self.method.strength * self.b, 1 + self.gain)

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x W'ᵀ + bias."""
        y = weight(x)
        common = self.owner[0][f"width{weight.in_features}"].to(x.dtype)  # type: ignore[index]
        change = F.linear(F.linear(x, self.a.to(x.dtype) + common), self.method.strength * self.b.to(x.dtype))
        change = change + y * self.gain.to(x.dtype)
        if self.method.routed:
            change = change * torch.sigmoid(x.mean(-1, keepdim=True))
        return y + change.to(y.dtype) if bias is None else y + change.to(y.dtype) + bias

    def penalty(self) -> Tensor | None:
        """The penalty on b, a scalar."""
        return self.method.price * self.b.square().sum() if self.method.price else None


@dataclasses.dataclass(frozen=True)
class Pair(Method):
    """W' = W + right · left, of the same rank at every site: its components can be dropped."""

    has_components: ClassVar[bool] = True

    rank: int = 2
    """Of every site."""

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        """Build the update; its output side is zero, so that nothing changes at first."""
        return PairUpdate(site, self.rank)

    def with_ranks(self, ranks: Mapping[str, int]) -> Self:
        """The configuration with this rank, which is the same at all sites."""
        (rank,) = set(ranks.values())
        return dataclasses.replace(self, rank=rank)


class PairUpdate(Update):
    """One site of `Pair`."""

    roles: ClassVar[Mapping[str, Role]] = {"left": "in", "right": "out"}

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(rank, site.in_features))  # [R, I]
        self.right = nn.Parameter(torch.zeros(site.out_features, rank))  # [O, R]

    def factors(self, weight: Weight) -> Factors:
        """The two factors, unscaled."""
        return Factors(self.left, self.right)

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x W'ᵀ + bias."""
        return weight(x, bias) + F.linear(F.linear(x, self.left.to(x.dtype)), self.right.to(x.dtype))

    def low_rank_part(self) -> tuple[Update, str]:
        """The update itself, because all of it is low-rank."""
        return self, ""

    def from_svd(self, u: Tensor, s: Tensor, vh: Tensor) -> dict[str, Tensor]:
        """The factors from an SVD, with the singular values in the right one."""
        return {"left": vh, "right": u * s}


class Counter:
    """Counts optimizer steps; checks that gradients exist before and parameters change after a step."""

    def __init__(self, updates: Mapping[str, Update]) -> None:
        self.updates = updates
        self.steps = 0
        self.gradients = 0

    def plan(self, total_steps: int | None) -> None:
        """Accepts any number of steps."""

    def before_step(self) -> None:
        """Check that there are gradients."""
        self.gradients += all(update.b.grad is not None for update in self.updates.values())  # type: ignore[union-attr]

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write the count into the buffers, which are saved."""
        self.steps += 1
        for update in self.updates.values():
            update.steps.fill_(self.steps)  # type: ignore[operator]

    def finish(self) -> None:
        """Nothing to finish."""

    def state_dict(self) -> dict[str, Any]:
        """The step count, as controller state."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The step count, as controller state."""
        self.steps = state["steps"]


class Product(nn.Module):
    """A linear map that is no `nn.Linear`: x [..., I] -> x Wᵀ [..., O]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ."""
        return x @ self.weight.T


class ProductSite(Adapted):
    """The site kind for `Product`."""

    plural = "products"
    is_map = True

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Claim modules of class `Product`."""
        return isinstance(module, Product)

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str | None:
        """Why a module is no such site: another class, or no rows."""
        if not isinstance(module, Product):
            return f"{type(module).__name__} is not a product"
        return None if len(module.weight) else "a product without rows"

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> Site:
        """Describe the sizes of its matrix."""
        return Site(name, cls.kind, *module.weight.shape)  # type: ignore[misc]

    @classmethod
    def adopt(cls, module: nn.Module) -> Self:
        """Share its parameter."""
        return cls(module)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the base, or of the active update."""
        if self.active is None:
            return self.frozen(x)
        return self.updates[self.active](x, self.frozen)


@contextlib.contextmanager
def registered(**classes: type) -> Iterator[None]:
    """Register these storages, methods and site kinds within the `with` block."""
    homes: dict[str, dict[str, Any]] = {
        name: STORAGES if issubclass(cls, Storage) else METHODS if issubclass(cls, Method) else KINDS
        for name, cls in classes.items()
    }
    for name, cls in classes.items():
        assert name not in homes[name], f"{name} is registered already"
        homes[name][name] = cls
        setattr(cls, "kind" if issubclass(cls, Adapted) else "name", name)
    try:
        yield
    finally:
        for name in classes:
            del homes[name][name]
