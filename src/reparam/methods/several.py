"""Several methods in one adapter, each on its own modules: LoRA on the linear maps and single tokens of the embedding.

`parts` maps a pattern, which matches the end of a module's path, to the name and the settings of a method; the first
match wins. Sites that no pattern matches have the method of `default`. The method "none" changes no weight: it is for
modules whose bias alone trains, with `attach(..., bias=True)`. PEFT's folders with `bias="all"` and with
`trainable_token_indices` are such adapters.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from reparam.core.base import Factors, Role, Site, Update, Weight
from reparam.core.controller import Controller
from reparam.core.method import Method
from reparam.core.plain import decode
from reparam.core.registry import find_method, method
from reparam.methods import patterns

NONE = "none"


@method("several")
@dataclasses.dataclass(frozen=True)
class Several(Method):
    """Several methods in one adapter, each on its own modules.

    Raises ValueError for an unknown method or setting, an invalid pattern, and a method that cannot be a part: one with
    state that its sites share (such as mixtures), one that changes no weights, or one that always trains biases.
    `attach` raises it for a pattern that matches no site.

    >>> import torch, reparam
    >>> net = torch.nn.ModuleDict({"up": torch.nn.Linear(8, 6), "down": torch.nn.Linear(6, 8)})
    >>> method = reparam.Several({"method": "lora", "r": 2}, {"down": {"method": "full"}})
    Traceback (most recent call last):
    ValueError: Several: full cannot be a part: it always trains the biases of its sites
    >>> method = reparam.Several({"method": "lora", "r": 2}, {"down": {"method": "dora", "r": 1}})
    >>> adapter = reparam.attach(net, method)
    >>> {name: tuple(p.shape) for name, p, _ in adapter.named_parameters() if name.startswith("down")}
    {'down.magnitude': (8,), 'down.low_rank.A': (1, 6), 'down.low_rank.B': (8, 1)}
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"default": {"method": "lora", "r": 4}, "parts": {"q_proj|c_attn|q": {"method": "lora", "r": 2, "alpha": 4}}},
    )

    ties: ClassVar[bool] = True

    default: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"method": "lora"})
    """Name (`method`) and settings of the method on all sites that no pattern in `parts` matches."""
    parts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """A regular expression that matches the end of a path -> name (`method`) and settings. The first match wins."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("default", "parts"):  # plain values, so that a method equals the one that is read from its file
            try:
                plain = json.loads(json.dumps(getattr(self, field)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"Several: {field}: expected plain values, as JSON has them: {error}") from None
            object.__setattr__(self, field, plain)
        problems = patterns.broken("parts", self.parts)
        found: dict[str, Method | None] = {}
        for key, settings in {"": self.default, **self.parts}.items():
            where = f"parts[{key!r}]" if key else "default"
            try:
                found[key] = _made(settings, where)
            except ValueError as error:
                problems.append(str(error))
        problems += [f"{m.name} cannot be a part: {why}" for m in found.values() if m and (why := _unfit(m))]
        if problems:
            raise ValueError("Several: " + "; ".join(problems))
        self.__dict__["_found"] = found

    def of(self, name: str) -> Method | None:
        """The method at the site with this path; None if only its bias trains."""
        return self._methods()[self._part(name)]

    def _methods(self) -> dict[str, Method | None]:
        return self.__dict__["_found"]

    def _part(self, name: str) -> str:
        return next((pattern for pattern in self.parts if patterns.matches(pattern, name)), "")

    def _by_part(self, names: Iterable[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self._part(name), []).append(name)
        return found

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The targets of the default method, and the modules that the patterns of `parts` match."""
        own = self._methods()[""]
        return (*(own.default_targets if own else ()), *(rf"re:(.*\.)?({pattern})" for pattern in self.parts))

    def unsupported_reason(self, site: Site) -> str | None:
        """The reason of the site's method; for "none", if the module has no bias."""
        own = self.of(site.name)
        if own is None:
            return None if site.bias else f"this {site.kind} has no bias, and its method is {NONE!r}"
        return own.unsupported_reason(site)

    def check(self, sites: list[Site]) -> None:
        """Raise ValueError for a pattern that matches no site, and for settings that do not fit a part's sites."""
        patterns.check_used("parts", self.parts, [site.name for site in sites], method="Several")
        for own, members in self._members(sites):
            own.check(members)

    def notes(self, sites: list[Site]) -> list[str]:
        """The warnings of all parts."""
        return [note for own, members in self._members(sites) for note in own.notes(members)]

    def idle_settings(self) -> list[str]:
        """Those of all parts."""
        return [note for own in self._methods().values() if own is not None for note in own.idle_settings()]

    def _members(self, sites: list[Site]) -> list[tuple[Method, list[Site]]]:
        by_name = {site.name: site for site in sites}
        parts = self._by_part(by_name)
        return [(own, [by_name[n] for n in names]) for part, names in parts.items() if (own := self._methods()[part])]

    def build(self, site: Site, weight: Weight, shared: nn.Module | None) -> Update:
        """A new update of the site's method."""
        own = self.of(site.name)
        return Unchanged() if own is None else own.build(site, weight, None)

    def controller(self, updates: Mapping[str, Update]) -> Controller | None:
        """The actions around an optimizer step of the only part that has any.

        Raises ValueError if two parts have.
        """
        found = {
            part: made
            for part, names in self._by_part(updates).items()
            if (own := self._methods()[part]) and (made := own.controller({name: updates[name] for name in names}))
        }
        if len(found) > 1:
            raise ValueError("Several: only one part can have a schedule, such as AdaLoRA's")
        return next(iter(found.values()), None)

    def with_ranks_of(self, updates: Mapping[str, Update]) -> Self:
        """The configuration that rebuilds these updates."""
        changed = {
            part: _plain(found)
            for part, names in self._by_part(updates).items()
            if (own := self._methods()[part])
            and (found := own.with_ranks_of({name: updates[name] for name in names})) != own
        }
        parts = {part: changed.get(part, settings) for part, settings in self.parts.items()}
        return dataclasses.replace(self, default=changed.get("", self.default), parts=parts)

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The configuration for sites with other paths (old -> new)."""
        by_part = self._by_part(names)
        made = {
            part: own.renamed({n: names[n] for n in by_part.get(part, ())})
            for part, own in self._methods().items()
            if own
        }
        parts = {
            pattern: _plain(made[part]) if part in made else dict(self.parts[part])
            for part in self.parts
            for pattern in patterns.exactly({names[n]: None for n in by_part.get(part, ())})
        }
        return dataclasses.replace(self, default=_plain(made[""]) if "" in made else self.default, parts=parts)


class Unchanged(Update):
    """No update of the weight: W' = W."""

    roles: ClassVar[Mapping[str, Role]] = {}

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x [..., I] -> x Wᵀ + bias [..., O]."""
        return weight(x, bias)

    def factors(self, weight: Weight) -> Factors:
        """Factors of rank 0."""
        a = torch.zeros(0, weight.in_features, device=weight.device)
        return Factors(a, torch.zeros(weight.out_features, 0, device=weight.device))


def _made(settings: Mapping[str, Any], where: str) -> Method | None:
    """The method that the settings describe; None for "none"."""
    rest = dict(settings)
    name = rest.pop("method", None)
    if name == NONE and not rest:
        return None
    if not isinstance(name, str):
        raise ValueError(f"{where}: expected a method, as in {{'method': 'lora', 'r': 8}}, found {settings!r}")
    return decode(find_method(name), rest, where)


def _plain(one: Method) -> dict[str, Any]:
    return {"method": one.name, **one.settings()}


def _unfit(one: Method) -> str | None:
    """Why this method cannot be a part, or None if it can."""
    if not one.changes_weights:
        return "it changes no weights"
    if type(one).shared is not Method.shared:
        return "its sites share state"
    if one.biases:
        return "it always trains the biases of its sites"
    return "a part has no parts" if isinstance(one, Several) else None
