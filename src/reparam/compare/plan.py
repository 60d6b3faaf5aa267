"""The plan of a comparison: what `reparam train` reads, and beside it who is compared, how often, at what expense.

    [base] [data] [adapter] [optim] [run]      as in a training run; common to all contestants
    [compare]                                  metric, seeds, rates, ranks, storages, budget
    [[compare.methods]]                        one for each method: its name and any of its settings

A setting that is given as a list, and is none, makes a contestant of each of its values. `ranks` does so for every
method that has a rank. A method may also have a `label`, `ranks` and `storages` of its own, and tables `adapter`,
`optim` and `base` that change these sections for it alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from reparam.core.checks import nearest
from reparam.core.registry import METHODS, STORAGES, find_method
from reparam.errors import ConfigError
from reparam.train.base import KEYS
from reparam.train.config import LORA_PLUS, SECTIONS, Config, build, read_tables, resolve

OWN = ("label", "ranks", "storages")
SECTIONS_OF_A_METHOD = ("adapter", "optim", "base")
# What a rank is called. AdaLoRA's budget ends at rank r a site and begins at half as much again.
RANKS: dict[str, Callable[[int], dict[str, int]]] = {
    "r": lambda r: {"r": r},
    "target_r": lambda r: {"target_r": r, "init_r": math.ceil(1.5 * r)},
}
RANKLESS = ("intrinsic",)  # their r is not what they train


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Who is compared, and how. Raises ValueError for what makes no sense."""

    metric: Literal["auto", "exact", "loss", "bits"] = "auto"
    """What is compared: exact match of answers, loss per answer token, or bits per byte of texts; auto is exact match
    where rows have answers, else bits per byte."""
    test: str | None = None
    """JSONL file that scores are reported on; by default half of data.valid, which rates are tuned on."""
    rows: int = 200
    """How many rows of each of the two are scored at most; they are drawn once, by run.seed."""
    methods: tuple[Mapping[str, Any], ...] = ()
    """The methods, each with its name and settings."""
    ranks: tuple[int, ...] = ()
    """Ranks of every method that has one; by default the method's own."""
    storages: tuple[str, ...] = ()
    """Storages of the base, by name; by default base.storage."""
    seeds: int = 3
    """Scored runs of each contestant, with seeds from run.seed on."""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates that every contestant is tuned over."""
    rungs: tuple[float, ...] = (0.25, 0.5)
    """Lengths of the tuning runs as shares of the steps, shortest first."""
    keep: float = 0.5
    """Share of the contestants that goes on after a rung; 1 stops nobody."""
    least: int = 8
    """Never fewer contestants than this go on."""
    reference: str = ""
    """Label of the contestant that the others are compared with; by default the first that is plain LoRA."""
    minutes: float | None = None
    """No run starts after this long; a second call goes on for as long again."""
    parameters: int | None = None
    """Contestants that train more than this are left out."""

    def __post_init__(self) -> None:
        problems = [
            f"{key}={value!r}: expected {what}"
            for key, value, what, right in (
                ("rows", self.rows, "at least 2", self.rows >= 2),
                ("seeds", self.seeds, "at least 1", self.seeds >= 1),
                ("rates", self.rates, "numbers above 0", self.rates and all(0 < r < math.inf for r in self.rates)),
                ("rungs", self.rungs, "rising shares in (0, 1]", _rising(self.rungs)),
                ("keep", self.keep, "a share in (0, 1]", 0 < self.keep <= 1),
                ("least", self.least, "at least 1", self.least >= 1),
                ("minutes", self.minutes, "above 0", self.minutes is None or self.minutes > 0),
                ("parameters", self.parameters, "at least 1", self.parameters is None or self.parameters >= 1),
            )
            if not right
        ]
        if problems:
            raise ValueError("; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to train: a method with its settings, on a storage."""

    label: str
    settings: Mapping[str, Any]
    """What differs from the common run, by dotted key."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A comparison, checked as far as it can be without the model."""

    compare: CompareConfig
    common: Mapping[str, Any]
    """The settings that all have, by dotted key."""
    contestants: tuple[Contestant, ...]
    reference: str
    notes: tuple[str, ...]
    """What the plan asks for and cannot be, in sentences for the report."""
    output: str

    def config(self, contestant: Contestant, more: Mapping[str, Any]) -> Config:
        """A training run of the contestant, with `more` settings on top."""
        return _resolved(self.common, {**contestant.settings, **more})


def read_plan(file: Path | None, overrides: Mapping[str, Any]) -> Plan:
    """The plan in a TOML file, if one is given, with dotted overrides such as {"compare.seeds": 5} on top.

    `compare.methods` may also be names, "lora,dora". Raises ConfigError, with all problems at once: whatever `resolve`
    refuses in a contestant, unknown keys of [compare] (naming the nearest), settings that are tuned or have no meaning
    here, a rank for a method that has none, two contestants with one label, an unknown reference.
    """
    tables = read_tables(file) if file is not None else {}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    problems = _misplaced(tables)
    table = dict(tables.pop("compare", {}))
    entries = _entries(table, problems)
    compare = build(CompareConfig, table, "compare", problems)
    common = {f"{s}.{key}": value for s, keys in tables.items() if s != "method" for key, value in keys.items()}
    contestants: list[Contestant] = []
    notes: list[str] = []
    known = compare or CompareConfig()  # so that one wrong key hides no other problem
    for entry in entries:
        storages = known.storages or (str(common.get("base.storage", "dense")),)
        contestants += _contestants(entry, known.ranks, storages, problems, notes)
    problems += _faults(contestants, common)
    reference = _reference(known.reference, contestants, problems)
    if problems:
        where = f"{file}: " if file is not None else ""
        raise ConfigError(where + "; ".join(dict.fromkeys(problems)))
    output = str(common.pop("run.output", "out/compare"))
    resolved = _resolved(common)  # so that values have their types, wherever they came from
    common = {key: value for key in common if (value := _at(resolved, key, common[key])) is not None}
    known = dataclasses.replace(known, methods=tuple(entries))
    return Plan(known, common, tuple(contestants), reference, tuple(dict.fromkeys(notes)), output)


def _at(config: Config, key: str, given: Any) -> Any:
    section, _, name = key.partition(".")
    if section == "base" and name not in KEYS:  # of a storage that only some contestants have, it is as it was given
        return config.base.settings.get(name, given)
    return getattr(getattr(config, section), name)


def _rising(rungs: Sequence[float]) -> bool:
    return bool(rungs) and all(a < b for a, b in itertools.pairwise((0.0, *rungs))) and rungs[-1] <= 1


def _misplaced(tables: dict[str, dict[str, Any]]) -> list[str]:
    """Unknown sections, and keys of a training run that mean nothing in a comparison."""
    known = [*SECTIONS, "compare"]
    problems = [
        f"unknown section [{section}]{nearest(section, known)}"
        for section in tables
        if section not in known and section != "method"
    ]
    if "method" in tables:
        problems.append(
            "[method] is for one training run: name the methods in [[compare.methods]], or with --methods lora,dora"
        )
    if "learning_rate" in tables.get("optim", {}):
        problems.append("optim.learning_rate is tuned for each contestant: give the grid as compare.rates")
    for key, value in (("base.path", "the base model"), ("data.train", "the rows to train on")):
        section, _, name = key.partition(".")
        if not tables.get(section, {}).get(name):
            problems.append(f"{key} must be set: {value}")
    return problems


def _entries(table: dict[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    """[[compare.methods]] as tables; taken out of `table`."""
    given = table.pop("methods", None)
    if isinstance(given, str):
        given = [name for name in given.split(",") if name]
    if not given or not isinstance(given, list | tuple):
        problems.append(f"compare.methods: name at least one, of {', '.join(METHODS)}")
        return []
    entries = [dict(entry) if isinstance(entry, Mapping) else {"name": str(entry)} for entry in given]
    problems += [
        f"compare.methods: entry {i + 1} has no name" for i, entry in enumerate(entries) if "name" not in entry
    ]
    return [entry for entry in entries if "name" in entry]


def _contestants(
    entry: Mapping[str, Any],
    ranks: Sequence[int],
    storages: Sequence[str],
    problems: list[str],
    notes: list[str],
) -> list[Contestant]:
    """What one entry stands for: the product of its settings that are lists, its ranks and its storages."""
    rest = {key: value for key, value in entry.items() if key not in OWN}
    name = str(rest.pop("name"))
    plus = name.lower() in LORA_PLUS
    try:
        method = find_method("lora" if plus else name)
    except ValueError:
        problems.append(f"compare.methods: unknown method {name!r}{nearest(name, METHODS)}")
        return []
    settings: dict[str, Any] = {"method.name": name}
    for section in SECTIONS_OF_A_METHOD:
        changes = rest.pop(section, {})
        settings |= {f"{section}.{key}": value for key, value in changes.items()}
        if section == "optim" and "learning_rate" in changes:
            problems.append(f"{name}: optim.learning_rate is tuned: give the grid as compare.rates")
    types = {field.name: str(field.type) for field in dataclasses.fields(method)}
    axes: list[list[tuple[str, dict[str, Any]]]] = []
    for key, value in rest.items():
        if isinstance(value, list) and not types.get(key, "").startswith(("tuple", "Mapping")):
            axes.append([(f" {key}={v}" if len(value) > 1 else "", {f"method.{key}": v}) for v in value])
        else:
            settings[f"method.{key}"] = value
    axes += _rank_axis(name, types, rest, entry.get("ranks"), ranks, problems, notes)
    own = list(entry.get("storages", storages))
    axes.append([(f" {s}" if len(own) > 1 else "", {"base.storage": s}) for s in own])
    label = str(entry.get("label", "lora+" if plus else name))
    return [
        Contestant(label + "".join(text for text, _ in chosen), {**settings, **_merged(part for _, part in chosen)})
        for chosen in itertools.product(*axes)
    ]


def _rank_axis(
    name: str,
    types: Mapping[str, str],
    given: Mapping[str, Any],
    own: Sequence[int] | None,
    ranks: Sequence[int],
    problems: list[str],
    notes: list[str],
) -> list[list[tuple[str, dict[str, Any]]]]:
    """The ranks of one entry as an axis of the product; none where it has no ranks, or says its rank itself."""
    kind = next((key for key in RANKS if key in types and name not in RANKLESS), None)
    if kind is None:
        if own is not None:
            problems.append(f"{name}: has no rank, so ranks={list(own)} means nothing for it; leave it out")
        elif ranks:
            notes.append(f"{name} has no rank: it is one contestant whatever compare.ranks says.")
        return []
    if kind in given:
        if own is not None:
            problems.append(f"{name}: {kind} and ranks are both given; leave one out")
        return []
    wanted = own if own is not None else ranks
    if not wanted:
        return []
    settings = [{f"method.{key}": value for key, value in RANKS[kind](r).items()} for r in wanted]
    return [[(f" r={r}" if len(wanted) > 1 else "", part) for r, part in zip(wanted, settings, strict=True)]]


def _merged(parts: Any) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


def _faults(contestants: Sequence[Contestant], common: Mapping[str, Any]) -> list[str]:
    """What is wrong with the contestants, each by itself and beside the others."""
    problems = []
    try:
        _resolved(common)
    except ConfigError as error:  # then every contestant would say the same
        return [str(error)]
    for contestant in contestants:
        try:
            _resolved(common, contestant.settings)
        except ConfigError as error:
            problems.append(f"{contestant.label}: {error}")
    labels = [contestant.label for contestant in contestants]
    problems += [
        f"two contestants are called {label!r}: give one of them another label"
        for label in dict.fromkeys(labels)
        if labels.count(label) > 1
    ]
    return problems


def _reference(wanted: str, contestants: Sequence[Contestant], problems: list[str]) -> str:
    """The label of the contestant that the others are compared with."""
    labels = [contestant.label for contestant in contestants]
    if wanted:
        if wanted not in labels:
            problems.append(f"compare.reference: no contestant is called {wanted!r}{nearest(wanted, labels)}")
        return wanted
    plain = [
        c.label for c in contestants if c.settings["method.name"] == "lora" and "optim.lora_plus" not in c.settings
    ]
    return next(iter([*plain, *labels]), "")


def _resolved(common: Mapping[str, Any], own: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """The configuration with `own` settings over the common ones, of which those of other storages do not count."""
    name = str({**common, **own}.get("base.storage", "dense"))
    fields = {storage: {f"base.{f.name}" for f in dataclasses.fields(cls)} for storage, cls in STORAGES.items()}
    foreign = {key for keys in fields.values() for key in keys} - fields.get(name, set())
    fitting = {key: value for key, value in common.items() if key not in foreign}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="method.name .* is taken for LoRA")  # the report shows the settings
        return resolve(None, {**fitting, **own})
