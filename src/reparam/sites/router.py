"""The site of a router: the module of a Mixture-of-Experts model that chooses the experts of each token.

transformers' routers hold a matrix [E, I] and compute scores, choices and weights from it. The output is computed by
the original module with the adapted matrix in the place of its own.
"""

from __future__ import annotations

import re
from typing import Any, Self

import torch
from torch import Tensor, nn

from reparam.core.base import Site, Update
from reparam.core.placing import patched
from reparam.sites.bank import Bank
from reparam.sites.kinds import kind
from reparam.sites.module import Adapted, without_hooks


@kind("router")
class Router(Adapted):
    """The original module's output with the base's matrix, or with that of the active adapter."""

    plural = "routers"

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether the module is a router of transformers with a matrix of its own."""
        return is_router(module)

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str | None:
        """The reason if its forward is patched; otherwise None."""
        if patched(module):
            name = type(module).__name__
            return f"{name} has a patched forward, which an update would bypass; load the model without the patch"
        return None if is_router(module) else f"{type(module).__name__} is not a router"

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> Site:
        """O experts and I inputs."""
        rows, columns = module.weight.shape  # type: ignore[misc]
        return Site(name, cls.kind, rows, columns, bias=module._parameters.get("bias") is not None)

    def __init__(self, origin: nn.Module) -> None:
        super().__init__(origin)
        self.body = (without_hooks(origin),)  # in a tuple so that it is not a submodule
        self._buffers.update(origin._buffers)  # such as corrections of the scores
        self._non_persistent_buffers_set |= origin._non_persistent_buffers_set
        self._parameters.update({name: p for name, p in origin._parameters.items() if name not in self._parameters})

    @classmethod
    def adopt(cls, module: nn.Module) -> Self:
        """Take over the matrix."""
        return cls(module)

    def check_update(self, update: Update) -> None:
        """Raise InputDependentError if the update has no effective weight."""
        update.effective_weight(self.frozen)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original module's output with the frozen or the adapted matrix, and its other tensors."""
        w, bias = self.frozen.tensor(), self.bias_of(self.active)
        if self.active is not None:
            update: Update = self.updates[self.active]  # type: ignore[assignment]
            if isinstance(update, Bank):
                if update.routing.trial is None:
                    raise ValueError("an adapter on a router cannot be part of a mixed batch; select it alone")
            else:
                w, offset = update.effective_weight(self.frozen), update.bias_delta()
                bias = bias if offset is None or bias is None else bias + offset
        own: dict[str, Tensor] = {"weight": w.to(self.frozen.dtype)}
        own |= {} if bias is None else {"bias": bias}
        for name, tensor in (*self._parameters.items(), *self._buffers.items()):
            if tensor is not None and name not in own:
                own[name] = tensor
        return torch.func.functional_call(self.body[0], own, args, kwargs)


def is_router(module: nn.Module) -> bool:
    """Whether this is a router of transformers that multiplies with its own matrix [E, I].

    The check is by the name of the class, because this package imports only torch.
    """
    cls, weight = type(module), module._parameters.get("weight")
    named = re.search(r"Router$|MoEV1Gate$", cls.__name__) and cls.__module__.startswith("transformers.models.")
    whole = cls.forward is nn.Linear.forward or any(True for _ in module.children())
    return bool(named) and weight is not None and weight.ndim == 2 and not whole
