"""The modules that adapters put into a model: at a site, in the place of a module trained whole, and at the root."""

from __future__ import annotations

from typing import ClassVar, Self, TypeGuard

import torch
from torch import Tensor, nn

from reparam.core.base import Kind, Site, Update, Weight
from reparam.weights.dense import DenseWeight, Layout, as_parameter
from reparam.weights.quantized import QuantizedMatrix

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
"""Where `nn.Module` keeps the hooks on its calls."""


class Adapted(nn.Module):
    """A module at a site: the frozen weight, the updates by adapter name, and the choice among them.

    A subclass is one kind of site, registered with `@kind("name")`. It says which modules it stands in for (`claims`,
    `unsupported_reason`, `describe`), takes one over (`adopt`), and implements `forward` and `stock`.
    """

    kind: ClassVar[Kind]
    plural: ClassVar[str]
    """What messages call modules of this kind."""
    is_map: ClassVar[bool] = False
    """Whether "all-linear", "attention" and "mlp" mean modules of this kind."""
    is_matrix: ClassVar[bool] = True
    """Whether regular expressions and the settings of PEFT's files mean it too, and a storage can quantize it."""
    stands_for: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """The parameters of the module that the site adapts; others of three dimensions are reported as missed."""
    can_add_bias: ClassVar[bool] = False
    """Whether an update may give a bias to a site that has none."""

    def __init__(self, origin: nn.Module, layout: Layout = "rows") -> None:
        super().__init__()
        self.layout: Layout = layout
        # The module's own parameters, under their own names: whoever looks for them in the model finds them.
        self._parameters["weight"] = origin._parameters["weight"]
        self._parameters["bias"] = origin._parameters.get("bias")
        self.frozen: Weight = DenseWeight.of(self, layout)  # W [O, I]
        self.updates = nn.ModuleDict()
        self.biases = nn.ParameterDict()  # an adapter's own bias [O], where it trains biases
        self.biased: set[str] = set()  # its keys, because asking a ParameterDict takes long
        self.active: str | None = None
        self.origin = (origin,)  # what was here before; in a tuple, so that it is no submodule
        for name in HOOKS:  # the very same tables, so that a handle that was given out still removes its hook
            self.__dict__[name] = origin.__dict__[name]
        self.train(origin.training)

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether this module is of this kind, supported or not. No two kinds may claim one module."""
        raise NotImplementedError

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str | None:
        """Why this kind cannot stand in for the module, or None."""
        raise NotImplementedError

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> Site:
        """The site that a supported module would be, under its path in the model."""
        raise NotImplementedError

    @classmethod
    def adopt(cls, module: nn.Module) -> Self:
        """The adapted form of a supported module. Nothing is copied."""
        raise NotImplementedError

    @classmethod
    def wrap(cls, module: nn.Module) -> Self:
        """The adapted form of a module. Raises ValueError where this kind cannot stand in for it."""
        problem = cls.unsupported_reason(module)
        if problem:
            raise ValueError(problem)
        return cls.adopt(module)

    def site(self, name: str) -> Site:
        """This place, under its path in the model."""
        w = self.frozen
        transposed = self.layout == "transposed"
        return Site(name, self.kind, w.out_features, w.in_features, transposed=transposed, bias=self.bias is not None)

    def check_update(self, update: Update) -> None:
        """Raise InputDependentError for an update without the form that this kind computes with; by default, none."""

    def add(self, name: str, update: Update, *, bias: bool = False) -> None:
        """Hold `update` under the adapter's name; with `bias`, also a copy of the bias to train, in float32 or more."""
        self.updates[name] = update
        if bias and self.bias is not None:
            dtype = torch.promote_types(self.bias.dtype, torch.float32)
            self.biases[name] = nn.Parameter(self.bias.detach().to(dtype, copy=True))
            self.biased.add(name)

    def drop(self, name: str) -> None:
        """Forget the adapter's update and bias."""
        if name in self.updates:
            del self.updates[name]
        if name in self.biased:
            del self.biases[name]
            self.biased.remove(name)

    def bias_of(self, name: str | None) -> Tensor | None:
        """The bias [O] that is used with this adapter."""
        return self.biases[name].to(self.frozen.dtype) if name in self.biased else self.bias

    def set_bias(self, bias: nn.Parameter | None) -> None:
        """Hold this bias [O] from now on, here and in what was here before; None for none.

        Raises ValueError where that computes without one.
        """
        origin = self.origin[0]
        if bias is not None and "bias" not in origin._parameters:
            raise ValueError(f"{type(origin).__name__} has no place for a bias")
        self._parameters["bias"] = origin.bias = bias  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:
        """The module's parameter in its layout; where the matrix is quantized, its dtype, shape and device alone."""
        parameter = self._parameters.get("weight")
        return QuantizedMatrix.of(self.frozen, self.layout) if parameter is None else parameter

    @property
    def bias(self) -> nn.Parameter | None:
        """The frozen bias [O]."""
        return self._parameters["bias"]

    def stock(self) -> dict[str, Tensor]:
        """The frozen tensors under the names and in the layout of the module that was here before."""
        found = {"weight": as_parameter(self.frozen.tensor(), self.layout)}
        return found if self.bias is None else {**found, "bias": self.bias}

    def restore(self) -> nn.Module:
        """The module as it was before, holding the current frozen weight and bias; if that is quantized, a bare one."""
        module = self.origin[0]
        module._parameters["bias"] = self.bias
        if self.frozen.dense_or_none is None:
            bare = type(self)(module, self.layout).train(self.training)
            bare.hold(self.frozen)
            return bare
        module._parameters["weight"] = self._parameters["weight"]
        return module.train(self.training)

    def hold(self, weight: Weight) -> None:
        """Hold this matrix [O, I] from now on, in its storage; the other one is let go."""
        dense = weight.dense_or_none
        if dense is None:
            shape = as_parameter(torch.empty(weight.out_features, weight.in_features, device="meta"), self.layout)
            self.origin[0]._parameters["weight"] = nn.Parameter(shape, requires_grad=False)
            self._parameters.pop("weight", None)
            self.frozen = weight
        elif weight is not self.frozen:
            matrix = as_parameter(dense.detach(), self.layout).contiguous()
            self._parameters["weight"] = nn.Parameter(matrix, requires_grad=False)
            self.frozen = DenseWeight.of(self, self.layout)


SHARED = "reparam_shared"  # where `Shared` is in a model


class Shared(nn.ModuleDict):
    """What all sites of an adapter have in common, by adapter. It is owned once, by the model's root."""

    def forward(self, x: Tensor) -> Tensor:
        """x itself: a root that is an `nn.Sequential` calls every module it owns, this one included."""
        return x


class Replaced(nn.Module):
    """A module that an adapter trains whole (a task's head, say): the original, and a full copy for each adapter."""

    def __init__(self, origin: nn.Module) -> None:
        super().__init__()
        self.origin = origin
        self.updates = nn.ModuleDict()
        self.active: str | None = None
        self.rows: list[str | None] | None = None  # of a mixed batch: the adapter of each row

    def copy_of(self, name: str | None) -> nn.Module:
        """The copy that this adapter uses: its own, or the original."""
        return self.updates[name] if name is not None and name in self.updates else self.origin

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the chosen copy computes; in a mixed batch, each copy on its own rows of x [B, ...]."""
        if self.rows is None:
            return self.copy_of(self.active)(x)
        if len(x) != len(self.rows):
            raise ValueError(f"a mixed batch of {len(self.rows)} rows met an activation of shape {list(x.shape)}")
        parts: dict[str | None, list[int]] = {}
        for row, name in enumerate(self.rows):
            parts.setdefault(name if name is not None and name in self.updates else None, []).append(row)
        found = torch.cat([self.copy_of(name)(x[rows]) for name, rows in parts.items()])
        order = [row for rows in parts.values() for row in rows]
        return found[torch.tensor(order, device=found.device).argsort()]

    @property
    def weight(self) -> Tensor:
        """The weight of the chosen copy, which models read for its dtype."""
        return self.copy_of(self.active).weight  # type: ignore[return-value]

    def drop(self, name: str) -> None:
        """Forget the adapter's copy."""
        if name in self.updates:
            del self.updates[name]


def is_quantized(module: nn.Module) -> TypeGuard[Adapted]:
    """Whether this module's matrix is in a quantized storage."""
    return isinstance(module, Adapted) and module.frozen.dense_or_none is None


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, told by name: this file imports torch only."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
