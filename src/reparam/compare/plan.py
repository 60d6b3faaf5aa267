"""Read the plan of a comparison: the configuration of `reparam train` plus the methods to compare and the budget.

    [base] [data] [adapter] [optim] [run]      as in a training run; shared by all contestants
    [compare]                                  metric, seeds, rates, ranks, storages, budget
    [[compare.methods]]                        one table for each method: its name and any of its settings

A list for a setting that takes a single value makes one contestant for each value in the list. `ranks` makes one
contestant for each rank of every method that has a rank. A method's table may also contain `label`, `ranks` and
`storages`, and tables `adapter`, `optim` and `base` that override these sections for this method only.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reparam.compare.settings import CompareConfig
from reparam.core.checks import nearest
from reparam.core.registry import METHODS, STORAGES, find_method
from reparam.errors import ConfigError
from reparam.train.base import KEYS
from reparam.train.config import LORA_PLUS, SECTIONS, USUAL_RATIO, Config, build, resolve
from reparam.train.documents import read_tables

MOST = 1000  # contestants of one method
OWN = ("label", "ranks", "storages")
SECTIONS_OF_A_METHOD = ("adapter", "optim", "base")
# Settings that give a method rank r, by the name of its rank. AdaLoRA starts at mean rank 1.5 r per site and ends at r.
RANKS: dict[str, Callable[[int], dict[str, int]]] = {
    "r": lambda r: {"r": r},
    "target_r": lambda r: {"target_r": r, "init_r": math.ceil(1.5 * r)},
}
RANKLESS = ("intrinsic",)  # methods with a setting r that does not determine the number of trained parameters


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One training configuration to compare: a method with its settings, on one storage of the base."""

    label: str
    settings: Mapping[str, Any]
    """Settings that override or extend the common ones, by dotted key."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A comparison whose settings are checked; whether they fit the model is checked by `preflight`."""

    compare: CompareConfig
    common: Mapping[str, Any]
    """Settings that all contestants share, by dotted key."""
    contestants: tuple[Contestant, ...]
    reference: str
    notes: tuple[str, ...]
    """Sentences for the report about requests of the plan that do not apply, such as ranks for a method without one."""
    output: str

    def config(self, contestant: Contestant, more: Mapping[str, Any]) -> Config:
        """The configuration of a training run of the contestant; `more` settings, by dotted key, override its own."""
        return _resolved(self.common, {**contestant.settings, **more})


def read_plan(file: Path | None, overrides: Mapping[str, Any]) -> Plan:
    """Read a plan from an optional TOML or YAML file, then apply overrides by dotted key, such as {"compare.seeds": 5}.

    `compare.methods` may also be a string of names, such as "lora,dora". Raises ConfigError, with all problems at once,
    for: settings of a contestant that `resolve` rejects; unknown keys of [compare]; a learning rate outside
    compare.rates; a section [method]; ranks for a method that has none; two contestants with the same label; an unknown
    reference.
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
    known = compare or CompareConfig()  # defaults, so that the checks below also run if a key is wrong
    for entry in entries:
        storages = known.storages or (str(common.get("base.storage", "dense")),)
        ratio = common.get("optim.lora_plus", USUAL_RATIO)
        contestants += _contestants(entry, known.ranks, storages, ratio, problems, notes)
    problems += _faults(contestants, common)
    if known.reference and known.reference not in (labels := [c.label for c in contestants]):
        near = nearest(known.reference, labels)
        problems.append(f"compare.reference: no contestant has the label {known.reference!r}{near}")
    if problems:
        where = f"{file}: " if file is not None else ""
        raise ConfigError(where + "; ".join(dict.fromkeys(problems)))
    output = str(common.pop("run.output", "out/compare"))
    resolved = _resolved(common)  # this converts values to their types; options give strings
    common = {key: value for key in common if (value := _at(resolved, key, common[key])) is not None}
    known = dataclasses.replace(known, methods=tuple(entries))
    reference = known.reference or _plain_lora(contestants, common)
    return Plan(known, common, tuple(contestants), reference, tuple(dict.fromkeys(notes)), output)


def _at(config: Config, key: str, given: Any) -> Any:
    section, _, name = key.partition(".")
    if section == "base" and name not in KEYS:  # a setting of a storage may not exist here; then keep the given value
        return config.base.settings.get(name, given)
    return getattr(getattr(config, section), name)


def _misplaced(tables: dict[str, dict[str, Any]]) -> list[str]:
    """Problems with sections and keys: unknown ones, required ones that are missing, and ones for a single run only."""
    known = [*SECTIONS, "compare"]
    problems = [
        f"unknown section [{section}]{nearest(section, known)}"
        for section in tables
        if section not in known and section != "method"
    ]
    if "method" in tables:
        problems.append(
            "[method] is for a single training run: list the methods in [[compare.methods]] or with --methods lora,dora"
        )
    if "learning_rate" in tables.get("optim", {}):
        problems.append(
            "optim.learning_rate is tuned for each contestant: set the learning rates to try in compare.rates"
        )
    if (objective := tables.get("run", {}).get("objective", "sft")) != "sft":
        problems.append(
            f"run.objective is {objective!r}, and the methods are compared by supervised training: leave it out, and "
            f"train each method on preferences with reparam train"
        )
    if tables.get("data", {}).get("streaming"):
        problems.append("data.streaming: the methods are compared on rows that are read once before; leave it out")
    for key, value in (("base.path", "the base model"), ("data.train", "the rows to train on")):
        section, _, name = key.partition(".")
        if not tables.get(section, {}).get(name):
            problems.append(f"{key} must be set: {value}")
    return problems


def _entries(table: dict[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    """Remove `methods` from the table [compare] and return one table for each method that has a name."""
    given = table.pop("methods", None)
    if isinstance(given, str):
        given = [name for name in given.split(",") if name]
    if not given or not isinstance(given, list | tuple):
        problems.append(f"compare.methods: list at least one of {', '.join(METHODS)}")
        return []
    entries = [dict(entry) if isinstance(entry, Mapping) else {"name": str(entry)} for entry in given]
    problems += [
        f"compare.methods: entry {i + 1} has no name; add one" for i, entry in enumerate(entries) if "name" not in entry
    ]
    fitting = []
    for i, entry in enumerate(entries):
        wrong = [
            f"compare.methods: entry {i + 1}: {key}: expected {what}"
            for key, (what, right) in _FORMS.items()
            if key in entry and not right(entry[key])
        ]
        problems += wrong
        if "name" in entry and not wrong:
            fitting.append(entry)
    return fitting


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and bool(value) and all(type(one) is kind for one in value)


_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a text", lambda value: isinstance(value, str)),
    "label": ("a text", lambda value: isinstance(value, str)),
    "ranks": ("a list of whole numbers", _list_of(int)),
    "storages": ("a list of texts", _list_of(str)),
    **{section: ("a table", lambda value: isinstance(value, Mapping)) for section in SECTIONS_OF_A_METHOD},
}
"""What the keys of an entry hold that are no settings of its method."""


def _contestants(
    entry: Mapping[str, Any],
    ranks: Sequence[int],
    storages: Sequence[str],
    ratio: Any,
    problems: list[str],
    notes: list[str],
) -> list[Contestant]:
    """The contestants of one entry: all combinations of its listed settings, its ranks and its storages.

    `ratio` is the setting `optim.lora_plus` of an entry whose name means LoRA+, unless the entry sets it.
    """
    rest = {key: value for key, value in entry.items() if key not in OWN}
    name = str(rest.pop("name"))
    plus = name.lower() in LORA_PLUS
    try:
        method = find_method("lora" if plus else name)
    except ValueError:
        problems.append(f"compare.methods: unknown method {name!r}{nearest(name, METHODS)}")
        return []
    settings: dict[str, Any] = {"method.name": "lora", "optim.lora_plus": ratio} if plus else {"method.name": name}
    for section in SECTIONS_OF_A_METHOD:
        changes = rest.pop(section, {})
        settings |= {f"{section}.{key}": value for key, value in changes.items()}
        if section == "optim" and "learning_rate" in changes:
            problems.append(f"{name}: optim.learning_rate is tuned: set the learning rates to try in compare.rates")
    types = {field.name: str(field.type) for field in dataclasses.fields(method)}
    axes: list[list[tuple[str, dict[str, Any]]]] = []
    for key, value in rest.items():
        if value == [] and not types.get(key, "").startswith(("tuple", "Mapping")):
            problems.append(f"{name}: {key}: the list is empty; remove it, or name at least one value")
            return []
        if isinstance(value, list) and not types.get(key, "").startswith(("tuple", "Mapping")):
            axes.append([(f" {key}={v}" if len(value) > 1 else "", {f"method.{key}": v}) for v in value])
        else:
            settings[f"method.{key}"] = value
    axes += _rank_axis(name, types, rest, entry.get("ranks"), ranks, problems, notes)
    own = list(entry.get("storages", storages))
    axes.append([(f" {s}" if len(own) > 1 else "", {"base.storage": s}) for s in own])
    label = str(entry.get("label", "lora+" if plus else name))
    if (count := math.prod(map(len, axes))) > MOST:
        problems.append(f"{label[:80]}: {count:,} contestants, more than {MOST:,}; shorten its lists")
        return []
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
    """Alternatives for the rank of one entry, as an axis of the product.

    Empty if the method has no rank, the entry sets its rank, or no ranks are given.
    """
    kind = next((key for key in RANKS if key in types and name not in RANKLESS), None)
    if kind is None:
        if own is not None:
            problems.append(f"{name}: has no rank, so ranks={list(own)} does not apply; remove it")
        elif ranks:
            notes.append(f"{name} has no rank: compare.ranks does not apply, and it is a single contestant.")
        return []
    if kind in given:
        if own is not None:
            problems.append(f"{name}: {kind} and ranks are both set; remove one")
        return []
    wanted = own if own is not None else ranks
    if not wanted:
        return []
    settings = [{f"method.{key}": value for key, value in RANKS[kind](r).items()} for r in wanted]
    return [[(f" r={r}" if len(wanted) > 1 else "", part) for r, part in zip(wanted, settings, strict=True)]]


def _merged(parts: Any) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


def _faults(contestants: Sequence[Contestant], common: Mapping[str, Any]) -> list[str]:
    """Problems of the common settings, of each contestant's settings, and of labels that occur twice."""
    problems = []
    try:
        _resolved(common)
    except ConfigError as error:  # every contestant would have the same problem
        return [str(error)]
    for contestant in contestants:
        try:
            _resolved(common, contestant.settings)
        except ConfigError as error:
            problems.append(f"{contestant.label}: {error}")
    labels = [contestant.label for contestant in contestants]
    problems += [
        f"two contestants have the label {label!r}: set `label` for one of them"
        for label in dict.fromkeys(labels)
        if labels.count(label) > 1
    ]
    return problems


def _plain_lora(contestants: Sequence[Contestant], common: Mapping[str, Any]) -> str:
    """Label of the first LoRA without LoRA+, else of the first contestant."""
    for contestant in contestants:
        config = _resolved(common, contestant.settings)
        if config.method.name == "lora" and config.optim.lora_plus is None:
            return contestant.label
    return contestants[0].label


def _resolved(common: Mapping[str, Any], own: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """The configuration from the common settings, without those of other storages, overridden by `own` settings."""
    name = str({**common, **own}.get("base.storage", "dense"))
    fields = {storage: {f"base.{f.name}" for f in dataclasses.fields(cls)} for storage, cls in STORAGES.items()}
    foreign = {key for keys in fields.values() for key in keys} - fields.get(name, set())
    fitting = {key: value for key, value in common.items() if key not in foreign}
    return resolve(None, {**fitting, **own})
