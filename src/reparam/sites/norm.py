"""The site of a norm: its weight [n] is a matrix of one column [n, 1], so that W' = diag(gain) W + B A applies to it.

The output is computed by the original module with the adapted weight and bias in place of its own, so norms that use
them differently (such as Gemma's 1 + weight) are computed correctly.

Shapes: n length of the vector, B rows of a batch.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from reparam.core.base import Site, Update
from reparam.core.placing import patched
from reparam.sites.bank import Bank
from reparam.sites.kinds import kind
from reparam.sites.layout import groups
from reparam.sites.module import Adapted, without_hooks


@kind("vector")
class Norm(Adapted):
    """x [..., n] -> the original module's output with the base weight and bias, or with those of the active adapter."""

    plural = "norms"
    is_matrix = False

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether the module holds a weight [n], an optional bias [n], and no other parameter, module or buffer."""
        return _parameters_problem(module) is None

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str | None:
        """The reason if it has other parameters, modules or buffers, or a patched forward; otherwise None."""
        if patched(module) and cls.claims(module):
            name = type(module).__name__
            return f"{name} has a patched forward, which an update would bypass; load the model without the patch"
        return _parameters_problem(module)

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> Site:
        """A matrix of one column: O = n, I = 1."""
        return Site(name, cls.kind, len(module.weight), 1, bias=getattr(module, "bias", None) is not None)  # type: ignore[arg-type]

    def __init__(self, origin: nn.Module) -> None:
        super().__init__(origin, "column")
        # It computes; the hooks fire on the call of this module. In a tuple so that it is not a submodule.
        self.body = (without_hooks(origin),)

    @classmethod
    def adopt(cls, module: nn.Module) -> Self:
        """Take over the weight [n] and the bias [n], if any."""
        return cls(module)

    def check_update(self, update: Update) -> None:
        """Raise InputDependentError if the update has no effective weight."""
        update.effective_weight(self.frozen)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        """The original module's output with the frozen or adapted tensors; `rest` (such as a gate) is passed on."""
        name = self.active
        if name is None:
            return self._computed(self.frozen.tensor(), self.bias, x, *rest)
        update: Update = self.updates[name]  # type: ignore[assignment]
        if isinstance(update, Bank):
            return self._mixed(update, x, *rest)
        bias, offset = self.bias_of(name), update.bias_delta()
        if offset is not None:
            assert bias is not None, "attach rejects bias updates for sites without a bias"
            bias = (bias + offset).to(bias.dtype)
        return self._computed(update.effective_weight(self.frozen), bias, x, *rest)

    def _computed(self, w: Tensor, bias: Tensor | None, *args: Tensor) -> Tensor:
        """The original module's output for these arguments, with the weight `w` [n, 1] and this bias."""
        own = {"weight": w.to(self.frozen.dtype).squeeze(1)}
        if bias is not None:
            own["bias"] = bias
        return torch.func.functional_call(self.body[0], own, args)

    def _mixed(self, bank: Bank, *args: Tensor) -> Tensor:
        """A mixed batch: each adapter's rows with its own weight and bias."""
        routing = bank.routing
        w = self.frozen.tensor()
        if routing.trial is not None:
            routing.trial.see(bank, args[0])
            return self._computed(w, self.bias, *args)
        layout = routing.layout(bank, args[0].shape)
        parts = groups(routing.slot_list[: layout.rows])
        outputs = []
        for slot, rows in parts.items():
            own, bias = (w, None) if slot < 0 else (bank.changed(slot, w), bank.bias_change(slot))
            bias = self.bias if self.bias is None or bias is None else self.bias + bias
            outputs.append(self._computed(own, bias, *(layout.pick(arg, rows) for arg in args)))
        found: Tensor = layout.merge(outputs, list(parts.values()))
        return found


def _parameters_problem(module: nn.Module) -> str | None:
    """Why the module's parameters are not those of a norm, or None."""
    name = type(module).__name__
    own = {name: parameter.ndim for name, parameter in module.named_parameters(recurse=False)}
    if own not in ({"weight": 1}, {"weight": 1, "bias": 1}):
        return f"{name} is not a norm: its parameters are not one weight [n] and an optional bias [n]"
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return f"{name} has submodules or buffers, so it is not a supported norm"
    return None
