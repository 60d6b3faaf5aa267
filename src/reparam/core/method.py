"""A method: the configuration that builds one update for each site, and answers what others need to know of it.

A method is one file. Whatever the rest of the package has to know of a method it asks here, or of its updates, never by
asking for a class; every question has a default, and a method answers those that concern it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, Self

from torch import nn

from reparam.core.base import Site, Update, Weight
from reparam.core.controller import Controller


class Subspace(Protocol):
    """A method that trains as many numbers as it is told to, whatever its sites are: the dimensions of a subspace."""

    @property
    def mode(self) -> str:
        """What kind of subspace it is, in a word."""

    def with_dimensions(self, d: int, draw: int = 0) -> Method:
        """The configuration that trains `d` numbers; another `draw` is another subspace."""

    def moved(self, site: Site) -> int:
        """How many of the model's numbers move at this site."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Configuration and factory in one; a frozen dataclass whose `__post_init__` refuses bad values.

    A subclass is registered with `@method("name")`, lists in `examples` the settings that the conformance suite
    builds, and implements `build`.
    """

    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    biases: ClassVar[bool] = False
    """Whether the biases of its sites train as they are, whatever `attach` is told."""
    changes_weights: ClassVar[bool] = True
    """Whether it goes on sites. If not, `reparam.adapter.without_sites` says how it is put on a model."""
    takes_context: ClassVar[bool] = False
    """Whether its shared state is a mixture's, which `reparam.context` tells tasks, masks and prompts to."""
    has_components: ClassVar[bool] = False
    """Whether its changes are sums of components that can be dropped one by one. It then has `with_ranks`, and its
    updates have a `low_rank_part`."""
    drops_empty_sites: ClassVar[bool] = True
    """Whether a site that has no component left leaves the adapter; otherwise it stays, with rank 0."""

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The targets where none are given."""
        return ("all-linear",)

    def unsupported_reason(self, site: Site) -> str | None:
        """Why it has no form for this site, or None. A word such as "all-linear" passes over such a site."""
        return None

    def check(self, sites: list[Site]) -> None:
        """Raise ValueError for settings that do not fit the sites as a whole."""

    def notes(self, sites: list[Site]) -> list[str]:
        """What is worth a warning about these settings on these sites, a sentence each. `attach` warns of them."""
        return []

    def shared(self, sites: list[Site]) -> nn.Module | None:
        """Make the state that all sites have in common, or None. `check` has passed for these sites.

        The model's root owns the result, trains it, moves it and saves it. An update that uses it keeps it in a tuple,
        never as a submodule of its own.

        If it has a `before_forward(model, args, kwargs)`, that is a forward pre-hook of the model while the adapter is
        selected.
        """
        return None

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        """A fresh update for one site. It changes nothing yet: its output equals the base's."""
        raise NotImplementedError

    def controller(self, updates: Mapping[str, Update]) -> Controller | None:
        """What must happen around an optimizer step, for all updates by site, or None."""
        return None

    def with_ranks_of(self, updates: Mapping[str, Update]) -> Self:
        """The configuration that builds updates of these shapes: itself, unless training made them smaller."""
        return self

    def with_ranks(self, ranks: Mapping[str, int]) -> Self:
        """The configuration that builds updates of these ranks, by site. Asked where it `has_components`."""
        raise NotImplementedError

    def no_components_reason(self) -> str | None:
        """Why there are no components with these settings, though the method has some with others; or None."""
        return None

    @property
    def magnitude_axis(self) -> Literal["output", "input"] | None:
        """What has a magnitude that trains: each row of W (output), each column (input), or nothing (None)."""
        return None

    @property
    def known_tasks(self) -> tuple[str, ...] | None:
        """The tasks that it goes by, a single one while they are not known; None where it goes by none."""
        return None

    def with_tasks(self, names: tuple[str, ...]) -> Self:
        """The configuration that goes by these tasks. Asked where there are `known_tasks`."""
        raise NotImplementedError

    @property
    def low_rank_tasks(self) -> tuple[str, ...] | None:
        """The tasks for each of which it is a change of low rank, so that it can be split; None where it cannot."""
        return None

    @property
    def expert_folders(self) -> tuple[str, ...]:
        """Folders of finished adapters that are its experts and have yet to be read."""
        return ()

    def with_experts(self, names: tuple[str, ...], ranks: Mapping[str, tuple[int, ...]]) -> Self:
        """The configuration with the experts that were read. Asked where there are `expert_folders`.

        `names` is what they are called, and `ranks` has the rank of each of them by site.
        """
        raise NotImplementedError

    def subspace(self) -> Subspace | None:
        """Itself, where the number of its dimensions is free; None for others."""
        return None

    def settings(self) -> dict[str, Any]:
        """The fields as plain JSON values; `METHODS[name](**settings)` gives an equal method."""
        return dataclasses.asdict(self)
