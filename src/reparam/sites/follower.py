"""The update of a module that shares its weight with another one, where one update acts on both."""

from __future__ import annotations

from torch import Tensor

from reparam.core.base import Factors, Update, Weight


class Follower(Update):
    """Passes on to the update of another site, and has no parameters of its own."""

    def __init__(self, update: Update) -> None:
        super().__init__()
        self.of = (update,)  # in a tuple, so that it is a submodule of the other site alone

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x W'ᵀ + bias [..., O]."""
        found: Tensor = self.of[0](x, weight, bias)
        return found

    def factors(self, weight: Weight) -> Factors:
        """The factors of the other site's update."""
        return self.of[0].factors(weight)

    def bias_delta(self) -> Tensor | None:
        """None: the two modules share a weight, not a bias."""
        return None

    def rows(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids [...] -> rows of W' [..., I]."""
        return self.of[0].rows(ids, weight)
