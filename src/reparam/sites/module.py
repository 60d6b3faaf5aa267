"""The modules that adapters add to a model: sites, and shared state at the root."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, ClassVar, Self, TypeGuard

import torch
from torch import Tensor, nn

from reparam.core.base import Kind, Site, Update, Weight
from reparam.core.placing import ADDED, Stays, carry, value_of
from reparam.errors import FormatError
from reparam.weights.dense import DenseWeight, Layout, as_parameter
from reparam.weights.layouts import layout_of
from reparam.weights.quantized import QuantizedMatrix

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
"""The attributes in which `nn.Module` keeps its hooks."""


class Biases(Stays, nn.ParameterDict):
    """The trained biases of a site, by adapter name."""


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
    packed_at: ClassVar[str] = ""
    """What comes before the names of a quantized weight's tensors in the files of a model."""
    has_bank: ClassVar[bool] = True
    """Whether a bank at the site holds the factors of a mixed batch; otherwise the module above computes its rows."""
    can_add_bias: ClassVar[bool] = False
    """Whether an update can add a bias to a site without one."""

    def __init__(self, origin: nn.Module, layout: Layout = "rows") -> None:
        super().__init__()
        # Models read sizes, `eps` and the like of their modules.
        self.__dict__ |= {
            name: value
            for name, value in vars(origin).items()
            if isinstance(value, int | float | str | tuple | None) and not name.startswith("_")
        }
        self.layout: Layout = layout
        # The original parameters keep their names, so that other code finds them in the model.
        self._parameters["weight"] = origin._parameters["weight"]
        self._parameters["bias"] = origin._parameters.get("bias")
        self.frozen: Weight = DenseWeight.of(self, layout)  # W [O, I]
        self.updates = nn.ModuleDict()
        self.biases = Biases()  # adapter name -> its trained bias [O]
        self.biased: set[str] = set()  # the keys of `biases`; a lookup in a ParameterDict is slow
        self.active: str | None = None
        self.origin = (origin,)  # the original module, in a tuple so that it is not a submodule
        _share_hooks(origin, self)
        carry(origin, self)
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
        w = self.frozen
        transposed = self.layout == "transposed"
        return Site(name, self.kind, w.out_features, w.in_features, transposed=transposed, bias=self.bias is not None)

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
        return self.biases[name].to(self.frozen.dtype) if name in self.biased else self.bias

    def set_bias(self, bias: nn.Parameter | None) -> None:
        """Replace the bias [O], here and in the original module; None removes it.

        Raises ValueError if the original module has no bias parameter.
        """
        origin = self.origin[0]
        if bias is not None and "bias" not in origin._parameters:
            raise ValueError(f"{type(origin).__name__} has no bias parameter, so no bias can be added")
        self._parameters["bias"] = origin.bias = bias  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:
        """The parameter of the original module; a `QuantizedMatrix` if the matrix is quantized."""
        parameter = self._parameters.get("weight")
        return QuantizedMatrix.of(self.frozen, self.layout) if parameter is None else parameter

    @property
    def bias(self) -> nn.Parameter | None:
        """The frozen bias [O]; its value, if it is offloaded."""
        own = self._parameters["bias"]
        return value_of(self, "bias") if own is not None and own.is_meta else own  # type: ignore[return-value]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The base's tensors under the names that they have in the files of a model, and the adapters' tensors."""
        found = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        sharded = any(hasattr(tensor, "full_tensor") for tensor in self.frozen.held())
        if is_quantized(self) and not sharded:
            for name in self.frozen.state_dict():
                del found[f"{prefix}frozen.{name}"]
            own = layout_of(self.frozen.storage).tensors_of_weight(self.frozen, ".")
            found.update({prefix + self.packed_at + name[2:]: tensor for name, tensor in own.items()})
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if is_quantized(self):
            self._translate(state_dict, prefix, missing=args[2], errors=args[4])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _translate(self, state: dict[str, Any], prefix: str, *, missing: list[str], errors: list[str]) -> None:
        """Rename the tensors of a quantized matrix from their names in files to those that the weight has for them."""
        start = f"{prefix}{self.packed_at}"
        path = f"{start}weight"
        if any(key.startswith(f"{prefix}frozen.") for key in state):  # of sharded weights, which keep their own names
            return
        parts = {key: state.pop(key) for key in list(state) if f"{key}.".startswith(f"{path}.")}
        shape = self.frozen.out_features, self.frozen.in_features
        weight = self.frozen
        try:
            if parts:
                own = {f"..{key.removeprefix(start)}": tensor for key, tensor in parts.items()}
                weight = layout_of(weight.storage).weight_from(own, ".", shape)
                if (weight.out_features, weight.in_features) != shape:
                    raise FormatError(f"{path}: {weight.out_features} x {weight.in_features}, expected {list(shape)}")
            else:
                missing.append(path)
        except FormatError as error:
            errors.append(f"{path}: {error}")
        if weight.storage != self.frozen.storage:
            self.hold(weight.to(self.frozen.device, self.frozen.dtype))
        state |= {f"{prefix}frozen.{name}": part for name, part in weight.state_dict().items()}

    def stock(self) -> dict[str, Tensor]:
        """The frozen tensors with the names and layout that they have in the original module."""
        found = {"weight": as_parameter(self.frozen.tensor(), self.layout)}
        return found if self.bias is None else {**found, "bias": self.bias}

    def restore(self) -> nn.Module:
        """The original module with the current weight and bias; for a quantized weight, a site without updates."""
        module = self.origin[0]
        module._parameters["bias"] = self._parameters["bias"]
        _share_hooks(self, module)
        carry(self, module)
        if self.frozen.dense_or_none is None:
            bare = type(self)(module, self.layout).train(self.training)
            bare.hold(self.frozen)
            return bare
        module._parameters["weight"] = self._parameters["weight"]
        return module.train(self.training)

    def hold(self, weight: Weight) -> None:
        """Replace the matrix by `weight` [O, I], in the storage of that; the old one is released."""
        dense = weight.dense_or_none
        if dense is None:
            shape = as_parameter(torch.empty(weight.out_features, weight.in_features, device="meta"), self.layout)
            self.origin[0]._parameters["weight"] = nn.Parameter(shape, requires_grad=False)
            self._parameters.pop("weight", None)
            self.frozen = weight
        elif weight is not self.frozen:
            matrix = as_parameter(dense.detach(), self.layout).contiguous()
            parameter = nn.Parameter(matrix, requires_grad=False)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # as transformers marks what it loads
            self._parameters["weight"] = parameter
            self.frozen = DenseWeight.of(self, self.layout)


def _share_hooks(one: nn.Module, other: nn.Module) -> None:
    """Let the other module have the hooks of the first one, in the same dicts: existing handles can remove them."""
    for name in HOOKS:
        other.__dict__[name] = one.__dict__[name]


def without_hooks(module: nn.Module) -> nn.Module:
    """A module that shares everything with this one but its hooks."""
    found = copy.copy(module)
    for name in ADDED:
        found.__dict__.pop(name, None)
    for name in HOOKS:
        found.__dict__[name] = OrderedDict() if isinstance(module.__dict__[name], dict) else None
    return found


SHARED = "reparam_shared"  # name of the `Shared` submodule in a model


class Shared(nn.ModuleDict):
    """The modules that all sites of an adapter share, by adapter name. A child of the model's root."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x unchanged, because a root that is an `nn.Sequential` calls all its children, including this one."""
        return x


def is_quantized(module: nn.Module) -> TypeGuard[Adapted]:
    """Whether this module is a site with a quantized weight."""
    return isinstance(module, Adapted) and module.frozen.dense_or_none is None


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`. The check is by class name, because this file imports only torch."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
