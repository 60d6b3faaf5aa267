"""The modules that adapters add to a model: sites, copies of fully trained modules, and shared state at the root."""

from __future__ import annotations

from typing import ClassVar, Self, TypeGuard

import torch
from torch import Tensor, nn

from reparam.core.base import Kind, Site, Update, Weight


class Adapted(nn.Module):
    """The module at a site: the frozen weight, the updates by adapter name, and the name of the active adapter.

    A subclass is one kind of site, registered with `@kind("name")`. It determines which modules it can replace
    (`claims`, `unsupported_reason`, `describe`), replaces one (`adopt`), and implements `forward` and `stock`.
    """

    kind: ClassVar[Kind]
    plural: ClassVar[str]
    """The plural noun for modules of this kind in messages."""
    is_map: ClassVar[bool] = False
    """Whether the targets "all-linear", "attention" and "mlp" include modules of this kind."""
    is_matrix: ClassVar[bool] = True
    """Whether regular-expression targets and PEFT's settings include this kind, and storages can quantize it."""
    stands_for: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """The module's parameters that the site adapts. Its other three-dimensional parameters are reported as skipped."""
    can_add_bias: ClassVar[bool] = False
    """Whether an update can add a bias to a site without one."""

    def __init__(self, origin: nn.Module, weight: Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight  # W [O, I]
        self.bias = bias
        self.updates = nn.ModuleDict()
        self.biases = nn.ParameterDict()  # adapter name -> its trained bias [O]
        self.biased: set[str] = set()  # the keys of `biases`; a lookup in a ParameterDict is slow
        self.active: str | None = None
        self.origin = (origin,)  # the original module, in a tuple so that it is not a submodule
        self.train(origin.training)

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether this module is of this kind, supported or not. Two kinds must not claim the same module."""
        raise NotImplementedError

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str | None:
        """Why this kind cannot replace the module, or None if it can."""
        raise NotImplementedError

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> Site:
        """The site for a supported module; `name` is its path in the model."""
        raise NotImplementedError

    @classmethod
    def adopt(cls, module: nn.Module) -> Self:
        """Create the replacement for a supported module, without copying its parameters."""
        raise NotImplementedError

    @classmethod
    def wrap(cls, module: nn.Module) -> Self:
        """Create the replacement for a module. Raises ValueError if this kind does not support it."""
        problem = cls.unsupported_reason(module)
        if problem:
            raise ValueError(problem)
        return cls.adopt(module)

    def site(self, name: str) -> Site:
        """The site of this module; `name` is its path in the model."""
        return Site(name, self.kind, self.weight.out_features, self.weight.in_features, bias=self.bias is not None)

    def check_update(self, update: Update) -> None:
        """Raise InputDependentError if this kind cannot compute with the update. The default accepts every update."""

    def add(self, name: str, update: Update, *, bias: bool = False) -> None:
        """Add an adapter's update; with `bias`, also a trainable copy of the bias in float32 or wider."""
        self.updates[name] = update
        if bias and self.bias is not None:
            dtype = torch.promote_types(self.bias.dtype, torch.float32)
            self.biases[name] = nn.Parameter(self.bias.detach().to(dtype, copy=True))
            self.biased.add(name)

    def drop(self, name: str) -> None:
        """Remove the adapter's update and bias, if it has any here."""
        if name in self.updates:
            del self.updates[name]
        if name in self.biased:
            del self.biases[name]
            self.biased.remove(name)

    def bias_of(self, name: str | None) -> Tensor | None:
        """The bias [O] used with this adapter (None for the base model), or None if there is none."""
        return self.biases[name].to(self.weight.dtype) if name in self.biased else self.bias

    def set_bias(self, bias: nn.Parameter | None) -> None:
        """Replace the bias [O], here and in the original module; None removes it.

        Raises ValueError if the original module has no bias parameter.
        """
        origin = self.origin[0]
        if bias is not None and "bias" not in origin._parameters:
            raise ValueError(f"{type(origin).__name__} has no bias parameter, so no bias can be added")
        self.bias = origin.bias = bias  # type: ignore[assignment]

    def stock(self) -> dict[str, Tensor]:
        """The frozen tensors with the names and layout that they have in the original module."""
        raise NotImplementedError

    def restore(self) -> nn.Module:
        """The original module with the current weight and bias; for a quantized weight, a site without updates."""
        if self.weight.dense_or_none is None:
            return type(self)(self.origin[0], self.weight, self.bias).train(self.training)
        module = self.origin[0]
        matrix = self.stock()["weight"]
        if matrix is not module.weight:
            module.weight = nn.Parameter(matrix.detach().contiguous(), requires_grad=False)
        return module.train(self.training)

    def hold(self, weight: Weight) -> None:
        """Replace the weight by the same matrix in another storage.

        For a quantized storage, the original module drops its dense matrix, too.
        """
        self.weight = weight
        if weight.dense_or_none is None:
            shape = weight.out_features, weight.in_features
            self.origin[0].weight = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


SHARED = "reparam_shared"  # name of the `Shared` submodule in a model


class Shared(nn.ModuleDict):
    """The modules that all sites of an adapter share, by adapter name. A child of the model's root."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x unchanged, because a root that is an `nn.Sequential` calls all its children, including this one."""
        return x


class Replaced(nn.Module):
    """A module that adapters train in full (for example a task head): the original and one copy per adapter."""

    def __init__(self, origin: nn.Module) -> None:
        super().__init__()
        self.origin = origin
        self.updates = nn.ModuleDict()
        self.active: str | None = None
        self.rows: list[str | None] | None = None  # in a mixed batch: the adapter of each row

    def copy_of(self, name: str | None) -> nn.Module:
        """The module that this adapter uses: its own copy, or the original if it has none."""
        return self.updates[name] if name is not None and name in self.updates else self.origin

    def forward(self, x: Tensor) -> Tensor:
        """The output of the active copy; in a mixed batch, each copy computes its own rows of x [B, ...]."""
        if self.rows is None:
            return self.copy_of(self.active)(x)
        if len(x) != len(self.rows):
            raise ValueError(
                f"cannot map an activation of shape {list(x.shape)} to the {len(self.rows)} rows of the mixed batch; "
                f"select one adapter at a time for this model"
            )
        parts: dict[str | None, list[int]] = {}
        for row, name in enumerate(self.rows):
            parts.setdefault(name if name is not None and name in self.updates else None, []).append(row)
        found = torch.cat([self.copy_of(name)(x[rows]) for name, rows in parts.items()])
        order = [row for rows in parts.values() for row in rows]
        return found[torch.tensor(order, device=found.device).argsort()]

    @property
    def weight(self) -> Tensor:
        """The weight of the active copy. Models read its dtype."""
        return self.copy_of(self.active).weight  # type: ignore[return-value]

    def drop(self, name: str) -> None:
        """Remove the adapter's copy, if it has one."""
        if name in self.updates:
            del self.updates[name]


def is_quantized(module: nn.Module) -> TypeGuard[Adapted]:
    """Whether this module is a site with a quantized weight."""
    return isinstance(module, Adapted) and module.weight.dense_or_none is None


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`. The check is by class name, because this file imports only torch."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
