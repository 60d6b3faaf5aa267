"""Make small real data sets for `reparam train --task`, from what Python and scikit-learn ship.

    python scripts/task_data.py out/data

writes JSONL files, each split into train and test:

- `modules`: classification. Docstrings of functions in the standard library, and which of eight modules they are from.
- `functions`: embedding. Names of functions in the standard library, and the first sentence of their docstrings.
- `names`: token-classification. The words of function signatures, and whether each is a name, a default or neither.
- `digits`: seq2seq. Numbers, and their names in English words.
- `diabetes`: regression. The measurements of 442 patients in words, and how the disease went on (scikit-learn).

The same Python gives the same files.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MODULES = ("argparse", "email", "http", "json", "logging", "os", "tarfile", "unittest")
MORE = (
    "ast",
    "asyncio",
    "calendar",
    "collections",
    "decimal",
    "fractions",
    "pathlib",
    "random",
    "shutil",
    "statistics",
)
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


def members(name: str) -> dict[str, tuple[Any, str]]:
    """The documented functions and classes of a module and its parts, by name, each with its docstring."""
    module = importlib.import_module(name)
    found: dict[str, tuple[Any, str]] = {}
    for key, value in sorted(vars(module).items()):
        if (inspect.isfunction(value) or inspect.isclass(value)) and str(value.__module__).startswith(name):
            parts = [(key, value)]
            if inspect.isclass(value):
                parts += [(f"{key}.{k}", v) for k, v in sorted(vars(value).items()) if inspect.isfunction(v)]
            for path, part in parts:
                text = " ".join((part.__doc__ or "").split())
                if len(text) > 20:
                    found[path] = (part, text)
    return found


def sentence(text: str) -> str:
    """The first sentence of a text."""
    return re.split(r"(?<=[a-z)])\.\s", text)[0].rstrip(".")[:200]


def modules() -> list[dict[str, Any]]:
    return [{"text": text[:300], "label": name} for name in MODULES for _, text in members(name).values()]


def functions() -> list[dict[str, Any]]:
    found = {}
    for module in (*MODULES, *MORE):
        for path, (_, text) in members(module).items():
            found.setdefault(sentence(text), f"{module}.{path}")
    return [{"anchor": name.replace(".", " ").replace("_", " "), "positive": text} for text, name in found.items()]


def names() -> list[dict[str, Any]]:
    found = []
    for module in (*MODULES, *MORE):
        for path, (part, _) in members(module).items():
            try:
                parameters = list(inspect.signature(part).parameters.values())
            except (TypeError, ValueError):
                continue
            words, tags = ["def", path.rpartition(".")[2], "("], ["O", "B-FUNCTION", "O"]
            for parameter in parameters:
                words.append(parameter.name)
                tags.append("B-PARAMETER")
                if isinstance(parameter.default, str | int | float | bool) and len(repr(parameter.default)) < 20:
                    words += ["=", repr(parameter.default)]
                    tags += ["O", "B-DEFAULT"]
            if 1 < len(parameters) < 12:
                found.append({"tokens": [*words, ")"], "tags": [*tags, "O"]})
    return found


def spelled(number: int) -> str:
    """A whole number below 1000 in English words."""
    small, tens = [*ONES.split(), "eighteen", "nineteen"], TENS.split()
    if number < 20:
        return small[number]
    if number < 100:
        return tens[number // 10 - 2] + (f" {small[number % 10]}" if number % 10 else "")
    return f"{small[number // 100]} hundred" + (f" {spelled(number % 100)}" if number % 100 else "")


def digits() -> list[dict[str, Any]]:
    return [{"input": str(number), "target": spelled(number)} for number in range(1000)]


def diabetes() -> list[dict[str, Any]]:
    from sklearn.datasets import load_diabetes

    found = load_diabetes(scaled=False)
    rows = zip(found.data.tolist(), found.target.tolist(), strict=True)
    return [
        {
            "text": ", ".join(f"{name} {value:g}" for name, value in zip(found.feature_names, values, strict=True)),
            "label": target / 100,
        }
        for values, target in rows
    ]


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for make in (modules, functions, names, digits, diabetes):
        rows = make()
        random.Random(0).shuffle(rows)
        count = max(1, len(rows) // 5)
        write(folder / f"{make.__name__}-test.jsonl", rows[:count])
        write(folder / f"{make.__name__}-train.jsonl", rows[count:])
        print(f"{make.__name__}: {len(rows) - count} rows to train on, {count} to test")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/data"))
