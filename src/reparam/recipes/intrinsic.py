"""`reparam intrinsic`: measure the intrinsic dimension d90 of a task for a base model by training runs.

The first runs are full fine-tuning of the same targets (by default, everything). Then d runs over a grid and between
two of its values (see `subspace`). Each run is the same as `reparam train` with the same settings. At each d, the first
random map is tried with all learning rates, and the other maps with the best of these rates; the metric is the mean
over maps. The rates, also those of full fine-tuning, are chosen on the rows that measure the metric, so both metrics
are slightly optimistic. A run whose result is in the output folder is not repeated:

    runs/<kind>-<d>-<rate>-<map>-<digest>/      output of `reparam train`, and result.json
    intrinsic.json      the curve               intrinsic.png
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
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
from reparam.core.plain import wrong_types
from reparam.core.registry import METHODS
from reparam.core.text import counted
from reparam.errors import ConfigError, Stopped
from reparam.evaluation.terminal import say
from reparam.hf.models import check_not_base
from reparam.io.native import read_json
from reparam.io.outputs import check_continued, clear
from reparam.io.staged import inside, write_file
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
RESULTS = ("runs", "intrinsic.json", "intrinsic.png")
NEVER = 10**9  # steps between evaluations and checkpoints: no run reaches it


@dataclasses.dataclass(frozen=True)
class SearchPlan:
    """Settings of the search for d90. Raises ValueError for a value out of range."""

    sizes: tuple[int, ...]
    """Dimensions d of the grid, in ascending order."""
    rates: tuple[float, ...] = (1e-2, 3e-2)
    """Learning rates at d = 1000; `scaled` converts them to other d."""
    full_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Learning rates of full fine-tuning."""
    maps: int = 1
    """Number of random maps (seeds of the method) per d, at least 1."""
    metric: str = "auto"
    """exact: share of right answers; saved: decrease of the loss (bits per byte for texts) from the base's; auto: saved
    for texts, else exact."""
    share: float = 0.9
    """Share of full fine-tuning's metric that d90 reaches, in (0, 1]."""
    chance: float = 0.0
    """Value of the metric "exact" for random guessing, in [0, 1)."""
    tolerance: float = 1.25
    """The search stops once d90 is at most this many times the largest failing d; above 1."""

    def __post_init__(self) -> None:
        if problems := wrong_types(self):
            raise ValueError("; ".join(problems))
        if not self.sizes or not all(low < high for low, high in itertools.pairwise((0, *self.sizes))):
            raise ValueError(f"sizes {list(self.sizes)}: expected one or more ascending whole numbers of at least 1")
        if not 1 < self.tolerance < math.inf:
            raise ValueError(f"tolerance {self.tolerance!r}: expected a finite number above 1")
        if self.metric not in METRICS:
            raise ValueError(f"--metric {self.metric!r}: expected one of {', '.join(METRICS)}")
        if not whole(self.maps, 1):
            raise ValueError(f"--maps {self.maps!r}: expected a whole number of at least 1")
        if not 0 < self.share <= 1 or not 0 <= self.chance < 1:
            raise ValueError(
                f"share {self.share!r}, chance {self.chance!r}: expected 0 < share <= 1 and 0 <= chance < 1"
            )
        bad = [rate for rate in (*self.rates, *self.full_rates) if not (finite(rate) and rate > 0)]
        if bad or not self.rates or not self.full_rates:
            raise ValueError(f"rates {bad or 'none'}: expected numbers above 0")


@dataclasses.dataclass(frozen=True)
class SearchOutcome:
    """The result of the search for d90."""

    curve: Curve | None
    """The measured curve; None if a signal ended the search."""
    metric: str
    rank: int | None = None
    """The lowest LoRA rank with at least d90 parameters; None if d90 is not known or no site is a linear map."""
    signal: int | None = None
    """Number of the signal that ended the search, or None."""


def intrinsic_to(config: Config, plan: SearchPlan, *, console: Console) -> SearchOutcome:
    """Find d90, and write and print the curve. `config.method` provides the `subspace` whose dimension d varies.

    With `run.fresh`, results of an earlier call are deleted first. Raises ValueError for settings, data, a folder
    with other content, or a reference metric that the user can fix, before the first subspace run, and RuntimeError if
    all runs of full fine-tuning failed.
    """
    subspace = config.method.subspace()
    if subspace is None:
        raise ConfigError(f"method.name {config.method.name!r} has no dimension d; use --method intrinsic to find d90")
    if config.run.objective != "sft":
        raise ConfigError(f"run.objective is {config.run.objective!r}, and d90 is measured by supervised training")
    if config.data.streaming:
        raise ConfigError("data.streaming: d90 is measured in runs over the same rows, read once before; leave it out")
    folder = Path(config.run.output)
    check_not_base(folder, config.base.path)
    earlier = (folder / RESULTS[0]).is_dir() and not (folder / "plan.toml").exists()  # reparam compare has a plan
    ours = earlier or (folder / RESULTS[1]).is_file()
    check_continued(folder, RESULTS, "results of reparam intrinsic", ours=ours, fresh=config.run.fresh)
    if config.run.fresh:
        clear(folder, RESULTS)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, fresh=False))
    least = dataclasses.replace(config, method=subspace.with_dimensions(plan.sizes[0]))
    job = prepare(least)  # checks all settings that need the model, before any training
    metric = _metric(plan.metric, job)
    total = sum(subspace.moved(site) for site in job.adapter.sites.values())
    if plan.sizes[-1] > total:
        raise ValueError(
            f"--grid goes up to {plan.sizes[-1]}, but only {counted(total, 'parameter')} can move; lower its end"
        )
    sites = job.adapter.sites
    linear = [sites[name] for name in targets.resolve(job.model, "all-linear") if name in sites]
    sides = sum(site.out_features + site.in_features for site in linear)
    say(console, f"{counted(len(sites), 'site')}, {counted(total, 'parameter')} that can move; metric: {metric}")
    runs = Runs(config, metric, _stamp(job), console)
    del job
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
    write_file(folder / RESULTS[1], (json.dumps(figures, indent=1) + "\n").encode())
    plot(curve, metric, folder / RESULTS[2])
    say(console, _table(curve, metric))
    for line in conclusions(curve, sides=sides, rank=rank):
        say(console, line)
    say(console, f"curve: {folder / 'intrinsic.json'} and intrinsic.png")
    return SearchOutcome(curve, metric, rank)


class Runs:
    """The training runs of one task. A run that is already in the output folder is not repeated.

    Args:
        config: settings that all runs share.
        metric: "exact" or "saved".
        stamp: digest of base and data. Results with another stamp are not reused.
        console: prints one line per run.
    """

    def __init__(self, config: Config, metric: str, stamp: str, console: Console) -> None:
        self.config, self.metric, self.stamp, self.console = config, metric, stamp, console

    def reference(self, plan: SearchPlan) -> tuple[float, float]:
        """The metric of the base, and the best of full fine-tuning. Raises RuntimeError if all of its runs failed."""
        found = [self.run("full", METHODS["full"](), rate, 0) for rate in plan.full_rates]
        good = [result for result in found if result["failed"] is None]
        if not good:
            raise RuntimeError(
                f"full fine-tuning failed at every learning rate: {found[-1]['failed']}; try lower --full-rates"
            )
        return float(good[0]["base"]), max(float(result["value"]) for result in good)

    def point(self, subspace: Subspace, d: int, plan: SearchPlan) -> Point:
        """Train with d dimensions at all rates and maps, and return the metric at the best rate."""

        def value(rate: float, number: int) -> float | None:
            own = subspace.with_dimensions(d, number)
            found: float | None = self.run(f"{subspace.mode}-{d}", own, rate, number)["value"]
            return found

        first = {rate: value(rate, 0) for rate in (scaled(rate, d) for rate in plan.rates)}
        best = max(first, key=lambda rate: -math.inf if first[rate] is None else float(first[rate] or 0.0))
        return Point(d, best, (first[best], *(value(best, number) for number in range(1, plan.maps))))

    def run(self, kind: str, method: Method, rate: float, number: int) -> dict[str, Any]:
        """Train once, or read the result of that run: its metric (`value`, None if it failed) and the base's."""
        config = self.config
        run = dataclasses.replace(config.run, output="", eval_every=NEVER, save_every=NEVER, keep=1)
        data = config.data if self.metric == "exact" else dataclasses.replace(config.data, score_rows=0)
        optim = dataclasses.replace(config.optim, learning_rate=rate)
        made = dataclasses.replace(config, method=method, run=run, data=data, optim=optim)
        own = hashlib.sha256(f"{dump(made)}\0{self.metric}\0{self.stamp}".encode()).hexdigest()[:8]
        folder = inside(Path(config.run.output) / RESULTS[0], f"{kind}-{rate:g}-{number}-{own}")
        file = inside(folder, "result.json")
        if file.exists():
            found = read_json(file)
        else:
            placed = dataclasses.replace(made, run=dataclasses.replace(run, output=str(folder)))
            found = self._trained(placed, keep_adapter=kind != "full")
            folder.mkdir(parents=True, exist_ok=True)
            write_file(file, (json.dumps(found, indent=1) + "\n").encode())
        shown = found["failed"] or f"{found['value']:.4f} ({found['seconds']:.0f} s)"
        say(self.console, f"{kind}, rate {rate:g}, map {number}: {shown}")
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
    """Convert a learning rate for d = 1000 to d: √(1000 / d) times the rate, rounded to three digits.

    Adam moves each of the d parameters by about the rate, and the maps preserve lengths. With this factor, a step in
    weight space has the same length for every d.

    >>> scaled(0.03, 1000), scaled(0.03, 10), scaled(0.03, 100_000)
    (0.03, 0.3, 0.003)
    """
    return float(f"{rate * math.sqrt(1000 / d):.3g}")


def conclusions(curve: Curve, *, sides: int, rank: int | None) -> list[str]:
    """Sentences that state d90, how reliable it is, and the LoRA rank with as many parameters."""
    goal = f"{curve.share:g} x {curve.full:.4g} = {curve.threshold:.4g}"
    if curve.d90 is None:
        return [f"d90: not reached. No d up to {curve.points[-1].d} reached {goal}; raise the grid's end, or add rates"]
    lines = [f"d90 = {curve.d90:,}: the smallest d that reached {goal}"]
    if curve.below is None:
        lines.append("the smallest d of the grid already passes, so d90 may be lower; lower the grid's start")
    else:
        lines.append(
            f"{curve.below:,} failed. d90 is an upper bound: other maps, rates or longer training may need fewer"
        )
    if curve.odd:
        sizes = ", ".join(map(str, curve.odd))
        lines.append(f"note: not monotone: {sizes} failed, though above d90; try more --maps or rates")
    if rank is not None:
        times = rank * sides / curve.d90
        lines.append(
            f"LoRA on the linear maps has {sides:,} parameters per rank, so rank {rank} is the lowest with at least "
            f"d90 parameters ({times:.1f} times as many). This compares counts only, because random directions have "
            f"full rank; also try ranks {2 * rank} and {4 * rank}"
        )
    return lines


def _metric(asked: str, job: Job) -> str:
    """Resolve "auto" from the held-out rows. Raises ValueError for "exact" if they are texts or none is answered."""
    texts = any(row.kind == "text" for row in job.held_out)
    if asked == "exact" and (texts or job.config.data.score_rows < 1):
        raise ValueError(
            "--metric exact counts right answers, but the held-out rows are texts, or data.score_rows is 0; choose "
            "--metric saved, the decrease of the loss from the base's"
        )
    return ("saved" if texts else "exact") if asked == "auto" else asked


def _stamp(job: Job) -> str:
    """Digests of the base's tensors and of the examples, as one JSON string."""
    return json.dumps([[job.train.digest(), job.valid.digest()], fingerprint(job.model)], sort_keys=True)


def _table(curve: Curve, metric: str) -> Table:
    table = Table(title=f"{metric} by dimension; full fine-tuning {curve.full:.4g}, threshold {curve.threshold:.4g}")
    for column in ("d", "rate", "mean over maps", "lowest", "highest", ""):
        table.add_column(column, justify="right")
    for point in curve.points:
        values: Sequence[float] = [value for value in point.values if value is not None]
        spread = (f"{min(values):.4f}", f"{max(values):.4f}") if values else ("failed", "failed")
        mark = "d90" if point.d == curve.d90 else "passes" if curve.passes(point) else ""
        table.add_row(f"{point.d:,}", f"{point.rate:g}", f"{point.mean:.4f}", *spread, mark)
    return table
