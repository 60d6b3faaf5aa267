"""The site of one expert's matrix in a module that keeps the matrices of its experts stacked in one parameter.

The module keeps the parameter [E, O, I] (or [E, I, O]) under its own name. A site holds a view of its expert's part, or
a weight of its own once that is quantized. `experts.py` makes the sites, and computes with them.

Shapes: E experts, O out_features, I in_features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from reparam.core.base import Site, Update, Weight
from reparam.sites.bank import Bank
from reparam.sites.held import BANK, Held
from reparam.sites.kinds import kind
from reparam.sites.module import Adapted, Biases
from reparam.weights.dense import DenseWeight, Layout, as_parameter
from reparam.weights.quantized import QuantizedMatrix

if TYPE_CHECKING:
    from collections.abc import MutableMapping

Choice = str | int | None
"""The name of an adapter, or a slot of the banks; None for the base."""


class Part(DenseWeight):
    """One expert's matrix: a view of the stacked parameter `name` of a module."""

    def __init__(self, parameters: MutableMapping[str, nn.Parameter | None], name: str, number: int, layout: Layout):
        nn.Module.__init__(self)
        self.name, self.number = name, number
        self.layout = layout
        self._holder = parameters
        self._of = ()
        self.out_features, self.in_features = self.matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        return self._holder[self.name].dtype  # type: ignore[union-attr]

    @property
    def whole(self) -> Tensor:
        """The stacked parameter of all experts."""
        return self._holder[self.name].detach()  # type: ignore[union-attr]

    def held(self) -> tuple[Tensor, ...]:
        """This expert's part of the parameter, a view."""
        return (self.whole[self.number],)


@kind("expert")
class Expert(Adapted):
    """x [N, I] -> x W'ᵀ [N, O], for the N tokens that are routed to this expert. Biases stay in the experts' module."""

    plural = "experts"
    is_map = True
    has_bank = False
    packed_at = "packed."  # transformers' rules for names take `experts.3.down_proj.weight` for a part of the stack

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """False: sites are made only by opening a module of experts."""
        return False

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str | None:
        """The reason: every module of this kind is a site already."""
        return f"{type(module).__name__} is not a part of a module of experts"

    def __init__(self, frozen: Weight, layout: Layout, training: bool) -> None:
        nn.Module.__init__(self)
        self.layout = layout
        self._parameters["bias"] = None
        self.frozen = frozen
        self.updates = nn.ModuleDict()
        self.biases = Biases()
        self.biased = set()
        self.active = None
        self.origin = ()  # type: ignore[assignment]
        self.training = training

    @property
    def stacked(self) -> bool:
        """Whether the matrix is a view of the stacked parameter."""
        return isinstance(self.frozen, Part)

    @property
    def weight(self) -> Tensor:
        """The matrix as the module keeps it, [O, I] or [I, O]; a `QuantizedMatrix` if it is quantized."""
        dense = self.frozen.dense_or_none
        return QuantizedMatrix.of(self.frozen, self.layout) if dense is None else as_parameter(dense, self.layout)

    def site(self, name: str) -> Site:
        """The site of this expert; `name` is its path in the model."""
        w = self.frozen
        return Site(name, self.kind, w.out_features, w.in_features, transposed=self.layout == "transposed")

    def update_of(self, choice: Choice) -> Update | Held | None:
        """The update of this adapter, or in this slot of the bank; None if it has none here."""
        if choice is None:
            return None
        updates = self._modules["updates"]._modules  # type: ignore[union-attr]
        if isinstance(choice, str):
            return updates.get(choice)  # type: ignore[return-value]
        bank: Bank | None = updates.get(BANK)  # type: ignore[assignment]
        return None if bank is None else bank.held(choice)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the base's matrix or, if an adapter is active, of its update."""
        return self.applied(x, self.active)

    def applied(self, x: Tensor, choice: Choice) -> Tensor:
        """x [N, I] -> [N, O] with the update of this adapter or slot; of the base's matrix if it has none here."""
        weight = self.frozen
        x = weight.cast(x)
        update = self.update_of(choice)
        return weight(x) if update is None else update(x, weight)

    def stock(self) -> dict[str, Tensor]:
        """The matrix, if it is not a part of the stacked parameter, which the module of experts has."""
        return {} if self.stacked else {"weight": as_parameter(self.frozen.tensor(), self.layout)}

    def restore(self) -> Self:
        """A site with the same matrix and no updates; the module of experts is closed later."""
        return type(self)(self.frozen, self.layout, self.training)

    def await_packed(self) -> None:
        """Show a parameter under the name that the packed matrix has in files, until `hold` gets it."""
        part = self.frozen
        assert isinstance(part, Part)
        self.frozen = Part({part.name: nn.Parameter(part.whole)}, part.name, part.number, self.layout)
        self.packed = nn.Module()
        self.packed.weight = nn.Parameter(part.held()[0], requires_grad=False)

    def hold(self, weight: Weight) -> None:
        """Replace the matrix by `weight` [O, I], in the storage of that."""
        self._modules.pop("packed", None)
        if weight.dense_or_none is None or isinstance(weight, Part):
            self.frozen = weight
        elif weight is not self.frozen:
            self.frozen = DenseWeight(weight.tensor().detach())

    def extra_repr(self) -> str:
        """Sizes, storage and the active adapter, for `repr`."""
        weight = self.frozen
        return f"in={weight.in_features}, out={weight.out_features}, {weight.storage.name}, active={self.active}"
