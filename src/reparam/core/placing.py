"""accelerate's hooks on modules: they move inputs to a device, and weights there for the time of a call (offloading).

accelerate patches the `forward` of a module and keeps the hook in `_hf_hook`. Between the calls of an offloaded module
its parameters are on the device "meta", and their values in the hook's `weights_map`. Nothing here imports accelerate.
The parameters of adapters are not offloaded with a model (`Stays`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

ADDED = ("_hf_hook", "_old_forward", "forward")
"""The attributes that accelerate sets in a module with a hook."""


class _Noticed:
    """An attribute of a module whose setting `Stays` notices. It is kept in the module's `__dict__`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        if self.name not in module.__dict__:
            raise AttributeError(self.name)
        return module.__dict__[self.name]

    def __set__(self, module: Stays, value: Any) -> None:
        module.__dict__[self.name] = value
        module._notice(self.name)

    def __delete__(self, module: nn.Module) -> None:
        if self.name not in module.__dict__:
            raise AttributeError(self.name)
        del module.__dict__[self.name]


class Stays(nn.Module):
    """A module whose parameters stay where they are used when accelerate offloads the model that it is in.

    Adapters read their parameters also outside of a forward pass (for factors, norms, files), where offloaded ones have
    no values, and train them, while accelerate drops the gradients of those that it loads for a call. So the hook that
    accelerate sets gets the parameters of before back, on its device, and does not offload.
    """

    _old_forward = _Noticed()  # accelerate sets this before it takes the parameters away
    _hf_hook = _Noticed()  # and this afterwards

    def _notice(self, name: str) -> None:
        if name == "_old_forward":
            self.__dict__["_before_hook"] = dict(self._parameters), dict(self._buffers)
            return
        before = self.__dict__.pop("_before_hook", None)
        for hook in hooks_of(self):
            if not getattr(hook, "offload", False):
                continue
            if before is None:  # the hook takes the place of another one
                hook.detach_hook(self)
            else:
                self._parameters.update(before[0])
                self._buffers.update(before[1])
            hook.offload = False
            if (device := hook.execution_device) is not None:
                for tensor in (*self._parameters.values(), *self._buffers.values()):
                    if tensor is not None:
                        tensor.data = tensor.data.to(device)


def patched(module: nn.Module) -> bool:
    """Whether the module's `forward` was replaced by anything but a hook of accelerate, which `carry` can move."""
    own: Any = vars(module).get("forward")
    if own is None or (getattr(own, "__self__", None) is module and own.__func__ is type(module).forward):
        return False  # the second is what accelerate leaves when it removes a hook
    return not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    """Whether a hook of accelerate is around the module's own forward."""
    own = vars(module)
    forward, old = own.get("forward"), own.get("_old_forward")
    return (
        "_hf_hook" in own
        and isinstance(forward, functools.partial)
        and forward.args == (module,)
        and getattr(old, "__func__", None) is type(module).forward
    )


def carry(one: nn.Module, other: nn.Module) -> None:
    """Give `other`, which takes the place of `one`, the hook of accelerate that `one` has; or none, if it has none."""
    if not _hooked(one):
        if _hooked(other):
            for name in ADDED:
                del other.__dict__[name]
        return
    other.__dict__["_hf_hook"] = one.__dict__["_hf_hook"]
    other.__dict__["_old_forward"] = type(other).forward.__get__(other)
    other.__dict__["forward"] = functools.update_wrapper(
        functools.partial(one.__dict__["forward"].func, other), other.__dict__["_old_forward"]
    )


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of accelerate on this module itself."""
    hook: Any = vars(module).get("_hf_hook")
    return list(getattr(hook, "hooks", [hook] if hook is not None else []))


def offload_of(module: nn.Module) -> Any:
    """The hook that keeps this module's own parameters elsewhere between calls; None if there is none."""
    return next((hook for hook in hooks_of(module) if getattr(hook, "offload", False)), None)


def value_of(module: nn.Module, name: str) -> Tensor | None:
    """The parameter `name` of this module; if it is offloaded, its value, on the device that computes."""
    tensor = module._parameters.get(name)
    if tensor is None or not tensor.is_meta:
        return tensor
    hook = offload_of(module)
    if hook is None or hook.weights_map is None:
        return tensor
    device = "cpu" if hook.execution_device is None else hook.execution_device
    value: Tensor = torch.as_tensor(hook.weights_map[name]).detach()
    return value.to(device=device, dtype=tensor.dtype)
