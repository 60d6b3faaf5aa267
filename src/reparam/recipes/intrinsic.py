"""`reparam intrinsic`: the intrinsic dimension of a task for a base model, d90, by training runs (see `subspace`).

Full fine-tuning comes first, over the same targets (by default, everything), then d over a grid and between two of its
sizes. Every run is exactly what `reparam train` does with the same settings. At each d, all rates are tried with the
first map, and the best of them with the others; what counts is the mean over maps. Rates are chosen by the rows that
the metric is measured on, full fine-tuning's too, so that both are a little too good. A run that is in the output
folder is not repeated:

    runs/<kind>-<d>-<rate>-<map>-<digest>/      as `reparam train` leaves it, and result.json
    intrinsic.json      the curve               intrinsic.png
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from reparam.core.checks import finite, whole
from reparam.core.method import Method, Subspace
from reparam.core.registry import METHODS
from reparam.errors import ConfigError, Stopped
from reparam.io.staged import digest, write_file
from reparam.recipes.subspace import Curve, Point, lora_rank, search_dimension
from reparam.recipes.subspace_plot import plot
from reparam.sites import targets
from reparam.sites.fingerprint import fingerprint
from reparam.train.attempt import attempt
from reparam.train.config import Config, dump
from reparam.train.job import Job
from reparam.train.run import prepare
from reparam.train.show import Show

METRICS = ("auto", "exact", "saved")
NEVER = 10**9  # steps


@dataclasses.dataclass(frozen=True)
class SearchPlan:
    """What is tried. Raises ValueError for what cannot be."""

    sizes: tuple[int, ...]
    rates: tuple[float, ...] = (1e-2, 3e-2)
    """For d = 1000; see `scaled`."""
    full_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    maps: int = 1
    """How many random maps (seeds of the method) each d is tried with."""
    metric: str = "auto"
    """exact: share of right answers; saved: loss (of texts: bits per byte) below the base's; auto: by the rows."""
    share: float = 0.9
    chance: float = 0.0
    """What guessing would reach, of "exact"."""
    tolerance: float = 1.25
    """How close d90 and the largest failing d are to come."""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"--metric {self.metric!r}: expected one of {', '.join(METRICS)}")
        if not whole(self.maps, 1):
            raise ValueError(f"--maps {self.maps!r}: expected a whole number of at least 1")
        if not 0 < self.share <= 1 or not 0 <= self.chance < 1:
            raise ValueError(f"share {self.share!r}, chance {self.chance!r}: expected shares of 1")
        bad = [rate for rate in (*self.rates, *self.full_rates) if not (finite(rate) and rate > 0)]
        if bad or not self.rates or not self.full_rates:
            raise ValueError(f"rates {bad or 'none'}: expected numbers above 0")


@dataclasses.dataclass(frozen=True)
class SearchOutcome:
    """What was found; no curve where a signal ended it."""

    curve: Curve | None
    metric: str
    rank: int | None = None
    """The LoRA rank that d90 suggests."""
    signal: int | None = None


def intrinsic_to(config: Config, plan: SearchPlan, *, console: Console) -> SearchOutcome:
    """Find d90, write the curve, and print it. `config.method` has the `subspace` whose d is varied.

    Raises ValueError for what the user can mend, among it a reference of which a share means nothing, before any
    subspace run; RuntimeError where every reference run failed.
    """
    subspace = config.method.subspace()
    if subspace is None:
        raise ConfigError(f"method.name {config.method.name!r}: d90 is measured with the method 'intrinsic'")
    least = dataclasses.replace(config, method=subspace.with_dimensions(plan.sizes[0]))
    job = prepare(least)  # all refusals that need the model, before anything is trained
    metric = _metric(plan.metric, job)
    total = sum(subspace.moved(site) for site in job.adapter.sites.values())
    if plan.sizes[-1] > total:
        raise ValueError(f"--grid goes up to {plan.sizes[-1]}, and only {total} numbers move; lower its end")
    sites = job.adapter.sites
    linear = [sites[name] for name in targets.resolve(job.model, "all-linear") if name in sites]
    sides = sum(site.out_features + site.in_features for site in linear)
    console.print(f"{len(sites)} sites, {total:,} numbers that move; metric: {metric}")
    runs = Runs(config, metric, _stamp(job), console)
    del job
    folder = Path(config.run.output)
    try:
        base, full = runs.reference(plan)
        curve = search_dimension(
            lambda d: runs.point(subspace, d, plan),
            base=max(base, plan.chance) if metric == "exact" else base,
            full=full,
            sizes=plan.sizes,
            share=plan.share,
            tolerance=plan.tolerance,
        )
    except Stopped as stopped:
        return SearchOutcome(None, metric, signal=stopped.number)
    rank = None if curve.d90 is None else lora_rank(curve.d90, sides) if sides else None
    figures = {
        **{"base model": config.base.path, "metric": metric, "base": curve.base, "full": curve.full},
        **{"share": curve.share, "threshold": curve.threshold, "d90": curve.d90, "fails below": curve.below},
        **{"fails above": list(curve.odd), "numbers that move": total, "suggested LoRA rank": rank},
        "method": {k: v for k, v in config.method.settings().items() if k != "d"},
        "points": [{**dataclasses.asdict(p), "passes": curve.passes(p)} for p in curve.points],
    }
    write_file(folder / "intrinsic.json", (json.dumps(figures, indent=1) + "\n").encode())
    plot(curve, metric, folder / "intrinsic.png")
    console.print(_table(curve, metric))
    for line in conclusions(curve, sides=sides, rank=rank):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"curve: {folder / 'intrinsic.json'} and intrinsic.png", highlight=False, soft_wrap=True)
    return SearchOutcome(curve, metric, rank)


class Runs:
    """Training runs of one task, each made once.

    Args:
        config: what all of them have in common.
        metric: "exact" or "saved".
        stamp: of base and data; a run under another one is another run.
        console: where a line for each is printed.
    """

    def __init__(self, config: Config, metric: str, stamp: str, console: Console) -> None:
        self.config, self.metric, self.stamp, self.console = config, metric, stamp, console

    def reference(self, plan: SearchPlan) -> tuple[float, float]:
        """The metric of the base, and the best of full fine-tuning. Raises RuntimeError where all runs failed."""
        found = [self.run("full", METHODS["full"](), rate, 0) for rate in plan.full_rates]
        good = [result for result in found if result["failed"] is None]
        if not good:
            raise RuntimeError(f"full fine-tuning failed at every rate: {found[-1]['failed']}; try lower --full-rates")
        return float(good[0]["base"]), max(float(result["value"]) for result in good)

    def point(self, subspace: Subspace, d: int, plan: SearchPlan) -> Point:
        """What d dimensions reach."""

        def value(rate: float, number: int) -> float | None:
            own = subspace.with_dimensions(d, number)
            found: float | None = self.run(f"{subspace.mode}-{d}", own, rate, number)["value"]
            return found

        first = {rate: value(rate, 0) for rate in (scaled(rate, d) for rate in plan.rates)}
        best = max(first, key=lambda rate: -math.inf if first[rate] is None else float(first[rate] or 0.0))
        return Point(d, best, (first[best], *(value(best, number) for number in range(1, plan.maps))))

    def run(self, kind: str, method: Method, rate: float, number: int) -> dict[str, Any]:
        """One run: its metric (`value`, None where it failed), and the base's."""
        config = self.config
        run = dataclasses.replace(config.run, output="", eval_every=NEVER, save_every=NEVER, keep=1)
        data = config.data if self.metric == "exact" else dataclasses.replace(config.data, score_rows=0)
        optim = dataclasses.replace(config.optim, learning_rate=rate)
        made = dataclasses.replace(config, method=method, run=run, data=data, optim=optim)
        own = hashlib.sha256(f"{dump(made)}\0{self.metric}\0{self.stamp}".encode()).hexdigest()[:8]
        folder = Path(config.run.output) / "runs" / f"{kind}-{rate:g}-{number}-{own}"
        file = folder / "result.json"
        if file.exists():
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        else:
            placed = dataclasses.replace(made, run=dataclasses.replace(run, output=str(folder)))
            found = self._trained(placed, keep_adapter=kind != "full")
            folder.mkdir(parents=True, exist_ok=True)
            write_file(file, (json.dumps(found, indent=1) + "\n").encode())
        shown = found["failed"] or f"{found['value']:.4f} ({found['seconds']:.0f} s)"
        self.console.print(f"{kind}, rate {rate:g}, map {number}: {shown}", highlight=False, soft_wrap=True)
        return found

    def _trained(self, config: Config, *, keep_adapter: bool) -> dict[str, Any]:
        began = time.perf_counter()
        result = attempt(config, show=Show(Console(quiet=True)), keep_adapter=keep_adapter)
        if isinstance(result, str):
            return {"value": None, "base": None, "failed": result, "seconds": 0.0}
        place = 1 if self.metric == "exact" else 0
        base, after = result.before[place].value, result.after[place].value
        value, base = (after, base) if self.metric == "exact" else (base - after, 0.0)
        failed = None if math.isfinite(value) else f"the metric is {value}"
        seconds = time.perf_counter() - began
        return {"value": value if failed is None else None, "base": base, "failed": failed, "seconds": seconds}


def scaled(rate: float, d: int) -> float:
    """The rate at d for one that is meant at 1000: √(1000 / d) times it, to three digits.

    Adam moves each of d numbers by about the rate, and maps keep lengths: so steps in the space of weights are as long.

    >>> scaled(0.03, 1000), scaled(0.03, 10), scaled(0.03, 100_000)
    (0.03, 0.3, 0.003)
    """
    return float(f"{rate * math.sqrt(1000 / d):.3g}")


def conclusions(curve: Curve, *, sides: int, rank: int | None) -> list[str]:
    """What the curve says, in sentences."""
    goal = f"{curve.share:g} x {curve.full:.4g} = {curve.threshold:.4g}"
    if curve.d90 is None:
        return [f"d90: not reached. No d up to {curve.points[-1].d} came to {goal}; raise the grid's end, or add rates"]
    lines = [f"d90 = {curve.d90:,}: the smallest d that reached {goal}"]
    if curve.below is None:
        lines.append("the smallest d of the grid passes already: d90 may be less; lower the grid's start")
    else:
        lines.append(
            f"{curve.below:,} failed. It is an upper bound: other maps, rates or longer training may need less"
        )
    if curve.odd:
        sizes = ", ".join(map(str, curve.odd))
        lines.append(f"[yellow]note[/yellow] not monotone: {sizes} failed though larger; try more --maps or rates")
    if rank is not None:
        times = rank * sides / curve.d90
        lines.append(
            f"LoRA on the linear maps has {sides:,} numbers for each rank, so that rank {rank} is the least with d90 "
            f"of them ({times:.1f} times as many). That bounds a count, not a rank: a random direction is of full "
            f"rank, so compare rank {rank} with {2 * rank} and {4 * rank} before settling"
        )
    return lines


def _metric(asked: str, job: Job) -> str:
    """Which metric the held-out rows allow. Raises ValueError for right answers of texts."""
    texts = any(row.kind == "text" for row in job.held_out)
    if asked == "exact" and (texts or job.config.data.score_rows < 1):
        raise ValueError(
            "--metric exact counts right answers, and the held-out rows are texts, or none of them is answered "
            "(data.score_rows); choose --metric saved, the loss below the base's"
        )
    return ("saved" if texts else "exact") if asked == "auto" else asked


def _stamp(job: Job) -> str:
    """A digest of the base's tensors and of the data's content."""
    files = (job.config.data.train, job.config.data.valid)
    content = [digest(file) for file in files if file]
    return json.dumps([content, fingerprint(job.model)], sort_keys=True)


def _table(curve: Curve, metric: str) -> Table:
    table = Table(title=f"{metric} by dimensions; full fine-tuning {curve.full:.4g}, threshold {curve.threshold:.4g}")
    for column in ("d", "rate", "mean over maps", "lowest", "highest", ""):
        table.add_column(column, justify="right")
    for point in curve.points:
        values: Sequence[float] = [value for value in point.values if value is not None]
        spread = (f"{min(values):.4f}", f"{max(values):.4f}") if values else ("failed", "failed")
        mark = "d90" if point.d == curve.d90 else "passes" if curve.passes(point) else ""
        table.add_row(f"{point.d:,}", f"{point.rate:g}", f"{point.mean:.4f}", *spread, mark)
    return table
