"""Before training: count each contestant's trained parameters, and check that all contestants fit the base."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reparam.adapter.attach import remove
from reparam.compare.data import MET, Sides
from reparam.compare.plan import Plan
from reparam.data.examples import Examples
from reparam.data.rows import read_rows
from reparam.data.tasks import task_names
from reparam.errors import ConfigError
from reparam.io.head import Head
from reparam.train.config import Config
from reparam.train.model import attached, by_task, loaded
from reparam.train.objectives import objective_of
from reparam.train.reading import tokenizer_of
from reparam.train.run import prepare

METRICS = {"exact": "exact match", "loss": "loss per token", "bits": "bits per byte"}
_METRICS_OF = {
    "answers": ("exact", "loss"),
    "texts": ("bits",),
    "classification": ("accuracy", "f1", "f1_macro", "matthews", "loss"),
    "regression": ("pearson", "spearman", "loss"),
    "token-classification": ("accuracy", "f1_macro", "span_f1", "loss"),
    "seq2seq": ("exact", "rouge_l", "loss"),
    "embedding": ("mrr", "recall_at_1", "loss"),
}


def preflight(plan: Plan, sides: Sides) -> tuple[dict[str, int], list[str]]:
    """Return the number of trained parameters by contestant, and the warnings raised meanwhile, as sentences.

    The base is loaded once for each of its configurations, and every contestant's adapter is attached to it.

    Raises ConfigError, with all problems at once, for contestants that do not fit the model.
    """
    found: dict[str, int] = {}
    problems: list[str] = []
    warned_of: dict[str, list[str]] = {}
    configs = {contestant.label: plan.config(contestant, {}) for contestant in plan.contestants}
    first = next(iter(configs.values()))
    head, names_of = _data(first, sides)
    for base in dict.fromkeys(config.base for config in configs.values()):
        model = loaded(base, head)
        for label, config in configs.items():
            if config.base != base:
                continue
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always", UserWarning)
                try:
                    method, _ = by_task(config.method, names_of)
                    adapter = attached(config, model, method, head)
                except ValueError as error:
                    problems.append(f"{label}: {error}")
                    continue
            for message in {str(w.message) for w in warned if issubclass(w.category, UserWarning)}:
                warned_of.setdefault(message, []).append(label)
            found[label] = sum(parameter.numel() for parameter in adapter.parameters())
            if adapter.removable:
                remove(model, adapter.name)
            else:
                model = loaded(base, head)
    if problems:
        raise ConfigError("; ".join(problems))
    return found, [f"{', '.join(labels)}: {message}." for message, labels in warned_of.items()]


def _data(config: Config, sides: Sides) -> tuple[Head | None, Callable[[], tuple[str, ...]]]:
    """What the model must be for, and a function that gives the tasks of the training rows."""
    if config.run.task == "causal":
        rows = read_rows(sides.train)
        return None, lambda: task_names(rows)
    own = dataclasses.replace(config.data, train=sides.train, valid=sides.valid, columns=())
    found = objective_of(config).data(dataclasses.replace(config, data=own), tokenizer_of(config))
    assert isinstance(found.train, Examples)
    items: Any = found.train.items
    return found.head, lambda: task_names(items)


def steps_of(plan: Plan, sides: Sides, place: Path) -> int:
    """Number of optimizer steps of a full run, counted as `reparam train` does."""
    files = {"data.train": sides.train, **MET}
    config = plan.config(plan.contestants[0], {**files, "data.valid": sides.valid})
    if config.run.max_steps > 0:
        return config.run.max_steps
    job = prepare(plan.config(plan.contestants[0], {**files, "run.output": str(place)}))
    return config.run.steps(len(job.drawn))


def metric_of(wanted: str, kind: str) -> str:
    """Name of the score for a metric and a kind of rows. Raises ConfigError if these rows do not have the metric.

    >>> metric_of("auto", "texts")
    'bits per byte'
    """
    known = _METRICS_OF[kind]
    if wanted != "auto" and wanted not in known:
        raise ConfigError(
            f"compare.metric: rows with {kind} have no metric {wanted!r}; set {' or '.join(known)}, or auto"
        )
    chosen = known[0] if wanted == "auto" else wanted
    by_rows = kind not in ("answers", "texts") and chosen == "loss"
    return "loss" if by_rows else METRICS.get(chosen, chosen.replace("_", " "))
