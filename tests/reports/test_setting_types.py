"""Every setting of every method, storage, section and plan: a value of a wrong type is refused with its name.

True is no number, and NaN and infinity are no setting.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import typing
from typing import Any

import pytest

import reparam.methods
import reparam.weights  # noqa: F401  (both fill their registries)
from reparam.compare.settings import CompareConfig
from reparam.core.registry import METHODS, STORAGES
from reparam.errors import ConfigError
from reparam.recipes.intrinsic import SearchPlan
from reparam.train.config import SECTIONS, resolve

OWN = {name: cls for name, cls in METHODS.items() if cls.__module__.startswith("reparam.")}
CLASSES: dict[str, Any] = {**OWN, **STORAGES, **SECTIONS, "compare": CompareConfig, "search": SearchPlan}
NUMBERS = [True, "abc", [], {}, math.nan, math.inf, -math.inf, 10**400, -(10**400), object()]
WRONG = {
    "int": [*NUMBERS, 1.5],
    "float": NUMBERS,
    "bool": ["abc", 2, None, [], math.nan],
    "str": [1, True, None, [], {}, math.nan],
    "tuple": ["abc", 3, True, {"a": 1}, [object()], [{}], math.nan],
    "Mapping": ["abc", 3, True, [1], {1: 2}, {"a": object()}, math.nan],
}
FREE = {  # fields without a rule
    ("max_grad_norm", math.inf),  # no clipping
}


def told(cls: Any, key: str) -> str:
    return next(str(field.type) for field in dataclasses.fields(cls) if field.name == key)


def wrong(cls: Any, key: str) -> list[Any]:
    hint = told(cls, key)
    kinds = [kind for kind in WRONG if hint.partition("[")[0].find(kind) >= 0 or f"| {kind}" in hint]
    named = vars(sys.modules[cls.__module__]).get(hint)  # such as LossOn = Literal["answers", "all"]
    if hint.startswith("Literal") or typing.get_origin(named) is typing.Literal:
        kinds = ["str"]
    assert kinds, hint
    values = [value for value in WRONG[kinds[0]] if not ("None" in hint and value is None)]
    if hint.startswith("str | tuple"):
        values = [value for value in values if value != []]
    if hint.startswith("int | str"):  # of bytes, or with a unit
        values = [value for value in values if value != "abc"]
    if "Any" in hint and kinds[0] == "Mapping":  # the values depend on the storage
        values = [value for value in values if not isinstance(value, dict) or 1 in value]
    if "Mapping" in hint and kinds[0] == "tuple":
        values = [value for value in values if value != [{}]]
    return [value for value in values if not any(key == name and value is free for name, free in FREE)]


@pytest.mark.parametrize("name", CLASSES)
def test_a_wrong_type_is_refused_with_the_name_of_the_setting(name: str) -> None:
    cls = CLASSES[name]
    needed = {"sizes": (1, 2)} if cls is SearchPlan else {}
    for key, value in ((field.name, value) for field in dataclasses.fields(cls) for value in wrong(cls, field.name)):
        with pytest.raises(ValueError, match=rf"\b{key}") as caught:
            cls(**{**needed, key: value})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", {**SECTIONS, **OWN})
def test_it_is_refused_in_files_too(name: str) -> None:
    section, more = (name, {}) if name in SECTIONS else ("method", {"method.name": name})
    cls = CLASSES[name]
    for key, value in ((field.name, value) for field in dataclasses.fields(cls) for value in wrong(cls, field.name)):
        if (name, key) == ("base", "settings"):
            continue  # no key of a file
        if value is None or value == "abc" or "object at" in str(value):
            continue  # TOML has no such value; a text may be that of an option
        if told(cls, key).startswith(("tuple[int", "tuple[float")) and type(value) is int:
            continue  # a number is a list of one
        with pytest.raises(ConfigError, match=rf"\b{key}"):
            resolve(None, {**more, f"{section}.{key}": value})


def test_true_is_no_number_in_a_plan_of_a_search() -> None:
    with pytest.raises(ValueError, match="sizes"):
        SearchPlan(())
    with pytest.raises(ValueError, match="sizes"):
        SearchPlan((2, 1))
    with pytest.raises(ValueError, match="sizes"):
        SearchPlan((True, 2))
