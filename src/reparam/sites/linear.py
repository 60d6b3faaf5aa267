"""The site of a linear map: a frozen weight, a bias, and updates by adapter name.

At most one update is active; with none, the site computes the base map. There is no merged state: `adapter/merge.py`
puts the original module back, with the merged values.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from reparam.core.base import Site, Update, Weight
from reparam.core.placing import patched
from reparam.sites.kinds import kind
from reparam.sites.module import Adapted, is_conv1d
from reparam.sites.router import is_router


@kind("linear")
class Linear(Adapted):
    """x [..., I] -> x W'ᵀ + bias [..., O]."""

    plural = "linear maps"
    is_map = True
    can_add_bias = True

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether the module is an `nn.Linear`, but no router, or GPT-2's `Conv1D`."""
        return (isinstance(module, nn.Linear) and not is_router(module)) or is_conv1d(module)

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str | None:
        """The reason if it is another module, overrides forward, or is bypassed by its parent; otherwise None."""
        name = type(module).__name__
        if patched(module):
            return f"{name} has a patched forward, which an update would bypass; load the model without the patch"
        if is_conv1d(module):
            return None
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return (
                "nn.MultiheadAttention reads the weight of its out_proj without calling it, so an update would do "
                "nothing"
            )
        if not isinstance(module, nn.Linear):
            return f"{name} is not a linear map"
        if type(module).forward is not nn.Linear.forward:
            return f"{name} overrides nn.Linear.forward, which an update would bypass"
        return None

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> Site:
        """O and I from the matrix, which is [O, I], or [I, O] in a `Conv1D`."""
        rows, columns = module.weight.shape  # type: ignore[misc]
        transposed, bias = is_conv1d(module), module.bias is not None
        sizes = (columns, rows) if transposed else (rows, columns)
        return Site(name, cls.kind, *sizes, transposed=transposed, bias=bias)

    @classmethod
    def adopt(cls, module: nn.Module) -> Self:
        """Take over the parameters without copying them; the output of the base model stays the same, bit for bit."""
        return cls(module, "transposed" if is_conv1d(module) else "rows")

    def forward(self, x: Tensor) -> Tensor:
        """The output of the base map or, if an adapter is active, of its update."""
        parts = self._modules  # nn.Module's attribute lookup takes longer than a small matrix product
        weight: Weight = parts["frozen"]  # type: ignore[assignment]
        x = weight.cast(x)
        name = self.active
        if name is None:
            return weight(x, self.bias)
        update: Update = parts["updates"]._modules[name]  # type: ignore[assignment, union-attr]
        return update(x, weight, self.bias_of(name))

    def extra_repr(self) -> str:
        """Sizes, storage and the active adapter, for `repr`."""
        weight = self.frozen
        return f"in={weight.in_features}, out={weight.out_features}, {weight.storage.name}, active={self.active}"
