"""The base class of methods: a configuration that builds one update for each site.

A method is one file. The rest of the package queries a method only through the attributes and functions below and those
of its updates, never with `isinstance`. All of them but `build` have defaults; a method overrides those that it needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, Self

from torch import nn

from reparam.core.base import Site, Update, Weight
from reparam.core.controller import Controller
from reparam.core.plain import wrong_types


class Subspace(Protocol):
    """A method that trains a vector of a freely chosen dimension d: coordinates in a subspace of the weights."""

    @property
    def mode(self) -> str:
        """The kind of subspace, as one word."""

    def with_dimensions(self, d: int, draw: int = 0) -> Method:
        """This configuration with dimension `d`; each `draw` gives a different random subspace."""

    def moved(self, site: Site) -> int:
        """The number of entries of the model's weights that change at this site."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Configuration and factory of updates: a frozen dataclass whose `__post_init__` rejects bad values.

    A subclass is registered with `@method("name")`, lists in `examples` the settings that the conformance suite
    builds, and implements `build`.
    """

    name: ClassVar[str]
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    biases: ClassVar[bool] = False
    """Whether the biases of its sites are always trained, even if `attach` is called with bias=False."""
    changes_weights: ClassVar[bool] = True
    """Whether the method is attached to sites. If not, `reparam.adapter.without_sites` puts it on a model."""
    takes_context: ClassVar[bool] = False
    """Whether its shared state is that of a mixture, to which `reparam.context` passes tasks, masks and prompts."""
    has_components: ClassVar[bool] = False
    """Whether its weight changes are sums of rank-1 components that can be dropped one by one. If so, it implements
    `with_ranks`, and its updates implement `low_rank_part`."""
    ties: ClassVar[bool] = False
    """Whether one of its updates can act on several modules that share a weight, as `attach(..., tie=True)` asks for.
    Such an update depends only on the weight and changes no bias."""
    drops_empty_sites: ClassVar[bool] = True
    """Whether a site with no components left is removed from the adapter; otherwise it stays with rank 0."""

    def __post_init__(self) -> None:
        """Raise ValueError for settings of a wrong type. A subclass with checks of its own calls this first."""
        if problems := wrong_types(self):
            raise ValueError(f"{getattr(self, 'name', type(self).__name__)}: {'; '.join(problems)}")

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The targets that are used if the user gives none."""
        return ("all-linear",)

    def unsupported_reason(self, site: Site) -> str | None:
        """Why the method cannot adapt this site, or None if it can. Keywords such as "all-linear" skip such a site."""
        return None

    def check(self, sites: list[Site]) -> None:
        """Raise ValueError if the settings do not fit these sites taken together."""

    def idle_settings(self) -> list[str]:
        """Settings that have no effect beside the others, one sentence each.

        `attach` refuses them. Loading a saved adapter warns of them.
        """
        return []

    def notes(self, sites: list[Site]) -> list[str]:
        """Warnings about these settings on these sites, one sentence each. `attach` issues them."""
        return []

    def shared(self, sites: list[Site]) -> nn.Module | None:
        """Create the module that all sites share, or return None. Called after `check` has passed for these sites.

        The model's root owns the module, so it is trained, moved and saved with the model. An update that uses it must
        hold it in a tuple, not as a submodule.

        If the module has a method `before_forward(model, args, kwargs)`, it runs as a forward pre-hook of the model
        while the adapter is selected.
        """
        return None

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        """Create the update for one site. Its initial output must equal that of the base model."""
        raise NotImplementedError

    def controller(self, updates: Mapping[str, Update]) -> Controller | None:
        """The actions before and after an optimizer step for these updates (site path -> update), or None."""
        return None

    def with_ranks_of(self, updates: Mapping[str, Update]) -> Self:
        """The configuration that rebuilds these updates, e.g. with ranks that training reduced; by default self."""
        return self

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The configuration for sites with other paths (old -> new); by default self. Methods with patterns need it."""
        return self

    def with_ranks(self, ranks: Mapping[str, int]) -> Self:
        """The configuration that builds updates of these ranks (site path -> rank). Required if `has_components`."""
        raise NotImplementedError

    def no_components_reason(self) -> str | None:
        """Why these settings give no components although the method `has_components`; or None if they do."""
        return None

    @property
    def magnitude_axis(self) -> Literal["output", "input"] | None:
        """Which parts of W have a trained magnitude: its rows ("output"), its columns ("input") or none (None)."""
        return None

    @property
    def known_tasks(self) -> tuple[str, ...] | None:
        """The tasks that select experts, a single placeholder until they are known; None if tasks have no effect."""
        return None

    def with_tasks(self, names: tuple[str, ...]) -> Self:
        """The configuration with these task names. Required if `known_tasks` is not None."""
        raise NotImplementedError

    @property
    def low_rank_tasks(self) -> tuple[str, ...] | None:
        """The tasks into which `reparam.split` can split the adapter, one low-rank update each; None if it cannot."""
        return None

    @property
    def expert_folders(self) -> tuple[str, ...]:
        """Folders of trained adapters that become its experts and have not been read yet."""
        return ()

    def with_experts(self, names: tuple[str, ...], ranks: Mapping[str, tuple[int, ...]]) -> Self:
        """The configuration with the experts that were read. Required if `expert_folders` is not empty.

        `names` are the names of the experts; `ranks` maps each site path to their ranks, in the same order.
        """
        raise NotImplementedError

    def subspace(self) -> Subspace | None:
        """self if the method is a `Subspace`, whose dimension can be chosen freely; otherwise None."""
        return None

    def settings(self) -> dict[str, Any]:
        """The fields as plain JSON values; `METHODS[name](**settings)` gives an equal method."""
        return dataclasses.asdict(self)
