"""Compute the figures of the report from the outcomes of all runs, as one dictionary: the content of `results.json`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from reparam.compare.command import command
from reparam.compare.pareto import front
from reparam.compare.plan import Plan
from reparam.compare.recommend import recommend
from reparam.compare.serving import Serving
from reparam.compare.statistics import Interval, interval, paired
from reparam.compare.trial import Outcome
from reparam.train.config import resolve

FORMAT = 1
COSTS = ("parameters", "step_seconds", "peak_bytes", "decode_seconds")


@dataclasses.dataclass(frozen=True)
class Findings:
    """Outcomes and measurements of a comparison so far."""

    plan: Plan
    metric: str
    steps: int
    parameters: Mapping[str, int]
    tuning: Sequence[Outcome]
    rates: Mapping[str, float]
    """Learning rate that tuning chose, by contestant."""
    scored: Sequence[Outcome]
    serving: Mapping[str, Serving]
    stopped: Mapping[str, str]
    """Reason, by contestant, for those that were stopped early or left out."""
    notes: Sequence[str]
    missing: Sequence[str]
    """Parts of the plan that were not run, as sentences."""
    machine: str


def results(found: Findings) -> dict[str, Any]:
    """Return the figures of the report.

    Seeds that some contestant has not finished are left out for all, unless no seed is finished by all.
    """
    compared = [c.label for c in found.plan.contestants if c.label not in found.stopped]
    whole = _whole_rounds(found.scored, compared)
    by_label = {label: [o for o in whole if o.label == label] for label in compared}
    values = {label: _values(runs, found.metric) for label, runs in by_label.items()}
    beside = values.get(found.plan.reference, {})
    rows = [_row(found, label, runs, beside) for label, runs in by_label.items() if runs]
    told = (score for o in found.scored for score in o.before if score["name"] == found.metric)
    larger = any(bool(score["larger_is_better"]) for score in told)
    fronts = {
        cost: front(
            {row["label"]: (row[cost], row["score"]["mean"]) for row in rows if row["score"] and row[cost] is not None},
            larger_is_better=larger,
        )
        for cost in COSTS
    }
    base = next((o.before for o in whole if o.failed is None and o.label == found.plan.reference), ())
    before = next((float(score["value"]) for score in base if score["name"] == found.metric), None)
    return {
        "format": FORMAT,
        "metric": found.metric,
        "larger_is_better": larger,
        "reference": found.plan.reference,
        "recommendation": recommend(
            values, found.parameters, found.plan.reference, found.metric, _failed(by_label), before, larger=larger
        ),
        "steps": found.steps,
        "seeds": sorted({o.seed for o in whole}),
        "rates": list(found.plan.compare.rates),
        "base": {score["name"]: score for score in base},
        "rows": sorted(rows, key=lambda row: _order(row, larger)),
        "fronts": fronts,
        "stopped": dict(found.stopped),
        "tuning": [_tuned(found, c.label) for c in found.plan.contestants],
        "notes": [*found.notes],
        "missing": [*found.missing],
        "machine": found.machine,
        "plan": _plan(found.plan),
    }


def _whole_rounds(scored: Sequence[Outcome], labels: Sequence[str]) -> list[Outcome]:
    ended: dict[int, set[str]] = {}
    for outcome in scored:
        ended.setdefault(outcome.seed, set()).add(outcome.label)
    whole = [seed for seed, there in ended.items() if there.issuperset(labels)]
    return [outcome for outcome in scored if outcome.seed in (whole or ended) and outcome.label in labels]


def _values(runs: Sequence[Outcome], name: str) -> dict[int, float]:
    """The named score by seed, for the runs that did not fail."""
    return {o.seed: float(s["value"]) for o in runs for s in o.after if o.failed is None and s["name"] == name}


def _failed(by_label: Mapping[str, Sequence[Outcome]]) -> set[str]:
    return {label for label, runs in by_label.items() if any(run.failed is not None for run in runs)}


def _row(found: Findings, label: str, runs: Sequence[Outcome], reference: Mapping[int, float]) -> dict[str, Any]:
    good = [run for run in runs if run.failed is None]
    scores = _values(runs, found.metric)
    difference = paired(scores, reference) if label != found.plan.reference else None
    names = [score["name"] for score in good[0].after] if good else []
    serving = found.serving.get(label)
    config = resolve(f"{runs[0].folder}/config.toml", {"run.output": "out/again"})
    return {
        "label": label,
        "method": config.method.name,
        "settings": config.method.settings(),
        "storage": config.base.storage,
        "rate": found.rates[label],
        "edge": len(found.plan.compare.rates) > 1 and found.rates[label] in _ends(found.plan.compare.rates),
        "parameters": found.parameters[label],
        "score": _plain(interval(list(scores.values()))) if scores else None,
        "others": {
            name: _plain(interval(list(_values(runs, name).values()))) for name in names if name != found.metric
        },
        "difference": _plain(difference),
        "seeds": {str(run.seed): {s["name"]: s for s in run.after} for run in good},
        "failed": {str(run.seed): run.failed for run in runs if run.failed is not None},
        "step_seconds": _median([run.step_seconds for run in good]),
        "peak_bytes": _median([run.peak_bytes for run in good]),
        "decode_seconds": serving.seconds if serving is not None else None,
        "serving": dataclasses.asdict(serving) if serving is not None else None,
        "curve": _curve(good),
        "command": command(config),
    }


def _ends(rates: Sequence[float]) -> tuple[float, float]:
    return min(rates), max(rates)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _curve(runs: Sequence[Outcome]) -> list[tuple[int, float]]:
    """Step and mean held-out loss over the runs, for each step that all runs have evaluated."""
    if not runs:
        return []
    curves = [dict(run.curve) for run in runs]
    common = [step for step in curves[0] if all(step in curve for curve in curves)]
    return [(step, statistics.fmean(curve[step] for curve in curves)) for step in common]


def _tuned(found: Findings, label: str) -> dict[str, Any]:
    """Losses of a contestant's tuning runs, by number of steps and then by learning rate; None for a failed run."""
    losses: dict[str, dict[str, float | None]] = {}
    for run in found.tuning:
        if run.label == label:
            losses.setdefault(str(run.steps), {})[f"{run.rate:g}"] = run.loss if run.loss < float("inf") else None
    return {"label": label, "rate": found.rates.get(label), "losses": losses}


def _order(row: Mapping[str, Any], larger: bool) -> float:
    if row["score"] is None:
        return float("inf")
    return float(-row["score"]["mean"] if larger else row["score"]["mean"])


def _plain(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else dataclasses.asdict(found)


def _plan(plan: Plan) -> dict[str, Any]:
    table = {key: value for key, value in dataclasses.asdict(plan.compare).items() if value is not None}
    return {**dict(plan.common), **{f"compare.{key}": value for key, value in table.items()}}
