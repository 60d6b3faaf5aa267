"""The module that goes into a model in place of a linear map: a frozen weight, a bias, and named updates.

One update at most is active; None is the base model. There is no merged state: folding an update gives back the
module that was here before, with new values (`merge.py`).
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from reparam.core.base import Update, Weight
from reparam.sites.module import Adapted, is_conv1d
from reparam.weights.dense import DenseWeight


class Linear(Adapted):
    """x [..., I] -> x W'ᵀ + bias [..., O]."""

    @classmethod
    def wrap(cls, module: nn.Module) -> Self:
        """Take over an `nn.Linear` or GPT-2's `Conv1D`, whose [I, O] matrix is transposed here, once, as a view.

        Nothing is copied, and the base computes what it did before, to the bit. Raises ValueError for anything else.
        """
        problem = unsupported_linear(module)
        if problem:
            raise ValueError(problem)
        matrix: nn.Parameter = module.weight  # type: ignore[assignment]
        if is_conv1d(module):
            matrix = nn.Parameter(matrix.detach().t(), requires_grad=False)
            module.weight = None  # type: ignore[assignment]
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        return cls(module, DenseWeight(matrix), bias)

    def forward(self, x: Tensor) -> Tensor:
        """The base map, or the active update's."""
        parts = self._modules  # nn.Module's look-up of an attribute takes longer than a small product
        weight: Weight = parts["weight"]  # type: ignore[assignment]
        x = weight.cast(x)
        name = self.active
        if name is None:
            return weight(x, self.bias)
        update: Update = parts["updates"]._modules[name]  # type: ignore[assignment, union-attr]
        return update(x, weight, self.bias_of(name))

    def stock(self) -> dict[str, Tensor]:
        """`weight` and, where there is one, `bias`."""
        matrix = self.weight.tensor()
        found = {"weight": matrix.t() if is_conv1d(self.origin[0]) else matrix}
        return found if self.bias is None else {**found, "bias": self.bias}

    def extra_repr(self) -> str:
        """Sizes, how the matrix is stored, and the active adapter."""
        weight = self.weight
        return f"in={weight.in_features}, out={weight.out_features}, {weight.storage.name}, active={self.active}"


def unsupported_linear(module: nn.Module) -> str | None:
    """Why `Linear` cannot stand in for this module, or None."""
    kind = type(module).__name__
    if "forward" in vars(module):
        return f"{kind} has a forward of its own set on it (by a device map or a hook); load the model without that"
    if is_conv1d(module):
        return None
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return (
            "nn.MultiheadAttention reads the weight of its out_proj without calling it, so an update would do nothing"
        )
    if not isinstance(module, nn.Linear):
        return f"{kind} is not a linear map"
    if type(module).forward is not nn.Linear.forward:
        return f"{kind} overrides nn.Linear.forward, which an update would bypass"
    return None
