"""A norm as a site: its weight [n] is a matrix W' = diag(gain) W + B A of one column [n, 1], its bias [n] the bias.

The module itself computes, with the changed tensors in the place of its own: whatever it does with them (T5's norm, or
Gemma's 1 + weight) is right.

Shapes: n length of the vector, B rows of a batch.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from reparam.core.base import Site, Update
from reparam.sites.bank import Bank
from reparam.sites.kinds import kind
from reparam.sites.module import Adapted


@kind("vector")
class Norm(Adapted):
    """x [..., n] -> what the module computes with its own, or the active update's, weight and bias."""

    plural = "norms"
    is_matrix = False

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """A module whose parameters are a weight [n] and, maybe, a bias [n], and that holds nothing else."""
        return _parameters_problem(module) is None

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str | None:
        """It has other parameters, modules or buffers, or a forward that a hook set on it."""
        if "forward" in vars(module) and cls.claims(module):
            name = type(module).__name__
            return f"{name} has a forward of its own set on it (by a device map or a hook); load the model without that"
        return _parameters_problem(module)

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> Site:
        """One column: O = n, I = 1."""
        return Site(name, cls.kind, len(module.weight), 1, bias=getattr(module, "bias", None) is not None)  # type: ignore[arg-type]

    @classmethod
    def adopt(cls, module: nn.Module) -> Self:
        """Take over the weight [n] and, where there is one, the bias [n]."""
        return cls(module, "column")

    def check_update(self, update: Update) -> None:
        """The update must have an effective weight."""
        update.effective_weight(self.frozen)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        """The module with its frozen tensors, or with the active update's; `rest` is handed on (a gate, say)."""
        name = self.active
        if name is None:
            return self._computed(self.frozen.tensor(), self.bias, x, *rest)
        update: Update = self.updates[name]  # type: ignore[assignment]
        if isinstance(update, Bank):
            return self._mixed(update, x, *rest)
        bias, offset = self.bias_of(name), update.bias_delta()
        if offset is not None:
            assert bias is not None, "attach refuses a change of a bias that is not there"
            bias = (bias + offset).to(bias.dtype)
        return self._computed(update.effective_weight(self.frozen), bias, x, *rest)

    def _computed(self, w: Tensor, bias: Tensor | None, *args: Tensor) -> Tensor:
        """What the module makes of its arguments with the weight `w` [n, 1]."""
        own = {"weight": w.to(self.frozen.dtype).squeeze(1)}
        if bias is not None:
            own["bias"] = bias
        return torch.func.functional_call(self.origin[0], own, args)

    def _mixed(self, bank: Bank, *args: Tensor) -> Tensor:
        """A mixed batch: the module once for the base, and once more for each adapter, on its own rows."""
        rows, _ = bank.routing.split(args[0].shape)
        by_row = [arg.unflatten(0, (rows, -1)) for arg in args]
        w = self.frozen.tensor()
        y = self._computed(w, self.bias, *args)
        out = y.unflatten(0, (rows, -1))  # a view
        for slot in bank.routing.slots.unique().tolist():
            if slot >= 0:
                here = bank.routing.slots == slot
                factors, offset = bank.read(slot)
                bias = self.bias if self.bias is None or offset is None else self.bias + offset
                own = self._computed(factors.apply(w), bias, *(arg[here].flatten(0, 1) for arg in by_row))
                out[here] = own.unflatten(0, (-1, by_row[0].shape[1]))
        return y


def _parameters_problem(module: nn.Module) -> str | None:
    """Why what the module holds is not what a norm holds, or None."""
    name = type(module).__name__
    own = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
    if own not in ({"weight": 1}, {"weight": 1, "bias": 1}):
        return f"{name} is no norm: its parameters are not one weight [n] and, maybe, one bias [n]"
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return f"{name} has modules or buffers of its own"
    return None
