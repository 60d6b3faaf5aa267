"""Run a whole comparison: split the data, tune, score seed by seed, measure latency, and report.

    results.json   report.html       runs/       one folder for each training run, see trial.py
    plan.toml                        data/       rows that were split off or cut

Tuning runs come first, rate by rate for all contestants; then scored runs, seed by seed for all contestants. So the
table is balanced even if a comparison stops early. A second call with the same folder continues and skips finished
runs. After a change of the plan, only the runs that it affects are repeated, and the report shows only its contestants.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch
from rich.console import Console

from reparam.compare.data import MET, Sides, sides
from reparam.compare.forecast import rung_steps, runs, seconds, seed_seconds
from reparam.compare.halving import better_half, stopped_early
from reparam.compare.plan import Contestant, Plan
from reparam.compare.preflight import metric_of, preflight, steps_of
from reparam.compare.results import Findings
from reparam.compare.serving import Serving, serving
from reparam.compare.trial import Outcome, Trial, done, trial
from reparam.compare.workers import Late, Workers
from reparam.compare.write import write
from reparam.core.progress import tracked
from reparam.core.text import counted
from reparam.errors import Stopped
from reparam.evaluation.terminal import say
from reparam.hf.models import check_not_base
from reparam.io.outputs import check_continued, clear
from reparam.io.staged import digest, write_file
from reparam.train.checkpoint import RunLock

RESULTS = ("plan.toml", "results.json", "report.html", "runs", "data")
TUNING = 1000  # added to run.seed for the tuning runs


@dataclasses.dataclass(frozen=True)
class Ended:
    """The report of a comparison, and the signal if one stopped it."""

    report: Path
    signal: int | None = None
    """Number of the signal that stopped the comparison early, or None."""


def compare(plan: Plan, *, workers: Workers, console: Console) -> Ended:
    """Run the comparison in the folder `plan.output` and write its report, also after a signal.

    With `run.fresh`, results of an earlier comparison in this folder are deleted first.

    Raises ValueError for a plan, data or a base that the user has to fix, and RuntimeError if a run cannot continue.
    """
    folder = Path(plan.output)
    check_not_base(folder, str(plan.common["base.path"]))
    held = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    unplanned = ".lock" in held and held <= {".lock", "data"}  # a call that ended before it had a plan
    fresh = bool(plan.common.get("run.fresh"))
    check_continued(folder, RESULTS, "a comparison", ours="plan.toml" in held or unplanned, fresh=fresh)
    plan = dataclasses.replace(plan, common={k: v for k, v in plan.common.items() if k != "run.fresh"})
    with RunLock(folder):
        if fresh:
            clear(folder, RESULTS)
        comparison = _Comparison(plan, folder, workers, console)
        write_file(folder / "plan.toml", _toml(plan).encode())
        number = None
        try:
            comparison.run()
        except Stopped as stopped:
            number = stopped.number
            comparison.missing.append(f"The comparison was {stopped}; the same command continues it.")
        return Ended(write(comparison.findings(), folder, console), number)


class _Comparison:
    """State of one call of `compare`."""

    def __init__(self, plan: Plan, folder: Path, workers: Workers, console: Console) -> None:
        self.plan, self.folder, self.workers, self.console = plan, folder, workers, console
        first = plan.config(plan.contestants[0], {})
        self.seed = first.run.seed
        self.sides: Sides = sides(
            first.data,
            plan.compare.test,
            folder / "data",
            rows=plan.compare.rows,
            seed=self.seed,
            task=first.run.task,
        )
        self.metric = metric_of(plan.compare.metric, self.sides.kind)
        self.parameters, self.notes = preflight(plan, self.sides)
        self.steps = steps_of(plan, self.sides, folder / "runs")
        self.stamp = f"{self.sides.stamp()} {_base_stamp(first.base.path)}"
        self.deadline = math.inf if plan.compare.minutes is None else time.monotonic() + 60 * plan.compare.minutes
        self.tuning: list[Outcome] = []
        self.scored: list[Outcome] = []
        self.rates: dict[str, float] = {}
        self.serving: dict[str, Serving] = {}
        self.stopped: dict[str, str] = {}
        self.missing: list[str] = []
        self.ended: dict[str, Outcome] = {}
        """The last run of each contestant that did not fail."""
        self.forecasted = False

    def run(self) -> None:
        """Tune, score and measure, until all is done or the time is up."""
        limit = self.plan.compare.parameters
        for label, count in self.parameters.items():
            if limit is not None and count > limit:
                self.stopped[label] = (
                    f"it trains {counted(count, 'parameter')}, more than compare.parameters ({limit:,})"
                )
        if not self.left():
            raise ValueError(f"compare.parameters={limit}: every contestant trains more parameters; raise the limit")
        planned = runs(self.plan.compare, len(self.left()), self.steps)
        tuning, total = sum(count for count, _ in planned[:-1]), sum(count * steps for count, steps in planned)
        most = f"at most {counted(tuning, 'tuning run')} and {counted(planned[-1][0], 'scored run')}, {total:,} steps"
        say(self.console, f"the plan has {most} in all")
        self.tune()
        self.score()
        self.measure()

    def left(self) -> list[Contestant]:
        """Contestants that were neither left out nor stopped."""
        return [contestant for contestant in self.plan.contestants if contestant.label not in self.stopped]

    def late(self) -> bool:
        """Whether compare.minutes have passed since the call began."""
        return time.monotonic() >= self.deadline

    def late_for_tuning(self, steps: int) -> bool:
        """Whether a tuning run of this many steps would take time that one scored run of each contestant needs.

        If these need more than compare.minutes, no time is kept for them: later calls of the command go on.
        """
        if self.plan.compare.minutes is None or self.late():
            return self.late()
        kept = seed_seconds(self.ended, [contestant.label for contestant in self.left()], self.steps)
        if kept >= 60 * self.plan.compare.minutes:
            return False
        run = max((seconds(outcome, steps) for outcome in self.ended.values()), default=0.0)
        return time.monotonic() + run + kept > self.deadline

    def forecast(self, outcome: Outcome) -> None:
        """Print what the plan and its scored runs take, at the speed of a run."""
        planned = runs(self.plan.compare, len(self.left()), self.steps)
        whole = sum(count * seconds(outcome, steps) for count, steps in planned)
        seed = seed_seconds({outcome.label: outcome}, [contestant.label for contestant in self.left()], self.steps)
        text = f"  at this speed the whole plan takes about {_time(whole)}, and each of its seeds {_time(seed)}"
        minutes = self.plan.compare.minutes
        if minutes is not None and seed >= 60 * minutes:
            text += f", more than --minutes {minutes:g}: call the same command again to continue, or plan fewer steps"
        say(self.console, text)

    def tune(self) -> None:
        """Choose each contestant's learning rate by successive halving, one rung after the other."""
        compare = self.plan.compare
        rates = {contestant.label: list(compare.rates) for contestant in self.left()}
        for number, share in enumerate(compare.rungs, 1):
            steps = rung_steps(share, self.steps)
            trials = [
                self.trial(contestant, rate, self.seed + TUNING, steps, tuning=True)
                for rate in compare.rates
                for contestant in self.left()
                if rate in rates[contestant.label]
            ]
            what = f"tuning, rung {number} of {len(compare.rungs)}, {counted(steps, 'step')}"
            found = self.perform(what, trials, functools.partial(self.late_for_tuning, steps))
            self.tuning += found
            losses: dict[str, dict[float, float]] = {}
            for outcome in found:
                losses.setdefault(outcome.label, {})[outcome.rate] = outcome.loss
            for label, by_rate in losses.items():
                rates[label] = better_half(by_rate)
                self.rates[label] = rates[label][0]
            if len(found) < len(trials):
                self.missing.append(
                    f"{len(trials) - len(found)} tuning runs of {steps} steps and all longer ones were not made: the "
                    f"time was {'up' if self.late() else 'kept for the scored runs'}."
                )
                break
            best = {label: min(by_rate.values()) for label, by_rate in losses.items()}
            stopped = stopped_early(
                best, self.parameters, reference=self.plan.reference, keep=compare.keep, least=compare.least
            )
            self.stopped |= {label: f"after {counted(steps, 'step')}, {why}" for label, why in stopped.items()}
            for label, why in stopped.items():
                say(self.console, f"  stopped {label}: {why}")

    def score(self) -> None:
        """Run the scored runs, seed by seed; start no seed that would not finish in time, judging by the last one."""
        took = 0.0
        entrants = [contestant for contestant in self.left() if contestant.label in self.rates]
        self.missing += [f"{c.label} was not tuned and therefore not scored." for c in self.left() if c not in entrants]
        count = self.plan.compare.seeds
        for seed in range(self.seed, self.seed + count):
            trials = [self.trial(c, self.rates[c.label], seed, self.steps, tuning=False) for c in entrants]
            fresh = any(done(one) is None for one in trials)
            if fresh and time.monotonic() + took >= self.deadline:
                self.missing.append(f"Seeds {seed} to {self.seed + count - 1} were not run: not enough time was left.")
                return
            began = time.monotonic()
            found = self.perform(f"seed {seed}, {counted(self.steps, 'step')}", trials, self.late)
            self.scored += found
            took = time.monotonic() - began if fresh else took
            if len(found) < len(trials):
                self.missing.append(f"Seed {seed} was not finished and is left out: the time was up.")
                return

    def measure(self) -> None:
        """Measure decoding, merging and size of the adapter from each contestant's first successful run."""
        for contestant in self.left():
            runs = [o for o in self.scored if o.label == contestant.label and o.failed is None]
            if runs:
                say(self.console, f"  measuring decoding with {contestant.label}", style="dim")
                self.serving[contestant.label] = serving(Path(runs[0].folder), self.plan.config(contestant, {}).base)

    def trial(self, contestant: Contestant, rate: float, seed: int, steps: int, *, tuning: bool) -> Trial:
        """Make a trial of the contestant. Tuning runs hold out the tuning rows, and scored runs the test rows."""
        settings: dict[str, Any] = {
            "data.train": self.sides.train,
            **MET,
            "data.valid": self.sides.valid if tuning else self.sides.test,
            "data.score_rows": self.plan.compare.rows,
            "optim.learning_rate": rate,
            "run.seed": seed,
            "run.max_steps": steps,
        }
        config = self.plan.config(contestant, settings)
        return trial(contestant.label, config, self.folder / "runs", tuning=tuning, stamp=self.stamp)

    def perform(self, what: str, trials: Sequence[Trial], late: Late) -> list[Outcome]:
        """Perform the trials that are not done yet, and print a line for each; return outcomes in order of `trials`."""
        known = [outcome for one in trials if (outcome := done(one)) is not None]
        fresh = [one for one in trials if done(one) is None]
        there = f", {len(known)} already done" if known else ""
        say(self.console, f"{what}: {counted(len(trials), 'run')}{there}")
        found = {outcome.folder: outcome for outcome in known}
        self.ended |= {outcome.label: outcome for outcome in known if outcome.failed is None}
        performed = tracked(self.workers(fresh, late), what, total=len(fresh), unit="runs")
        for number, outcome in enumerate(performed, 1):
            found[outcome.folder] = outcome
            score = f"failed: {outcome.failed}" if outcome.failed else _scores(outcome)
            say(
                self.console,
                f"  {number}/{len(fresh)}  {outcome.label}, rate {outcome.rate:g}: {score}  ({outcome.seconds:.0f} s)",
            )
            if outcome.failed is None:
                told, self.forecasted = self.forecasted, True
                self.ended[outcome.label] = outcome
                if not told:
                    self.forecast(outcome)
        return [found[one.folder] for one in trials if one.folder in found]

    def findings(self) -> Findings:
        """Everything that the report needs."""
        return Findings(
            plan=self.plan,
            metric=self.metric,
            steps=self.steps,
            parameters=self.parameters,
            tuning=self.tuning,
            rates=self.rates,
            scored=self.scored,
            serving=self.serving,
            stopped=self.stopped,
            notes=[*self.plan.notes, *self.sides.notes, *self.notes],
            missing=self.missing,
            machine=_machine(),
        )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _scores(outcome: Outcome) -> str:
    return ", ".join(f"{score['name']} {score['value']:.3f}" for score in outcome.after)


def _toml(plan: Plan) -> str:
    """The resolved plan as TOML that `reparam compare` can read."""
    tables: dict[str, dict[str, Any]] = {"run": {"output": plan.output}}
    for key, value in plan.common.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    tables["compare"] = {k: v for k, v in dataclasses.asdict(plan.compare).items() if v not in (None, (), "")}
    return tomli_w.dumps(tables)


def _base_stamp(path: str) -> str:
    """A string that changes when the config.json of a local base or the size of one of its weight files changes."""
    folder = Path(path)
    if folder.is_file():
        return digest(folder)
    config = digest(folder / "config.json") if (folder / "config.json").is_file() else path
    return " ".join([config, *(f"{f.name}:{f.stat().st_size}" for f in sorted(folder.glob("*.safetensors")))])


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    threads = f", {torch.get_num_threads()} of {os.cpu_count()} threads" if not torch.cuda.is_available() else ""
    return f"{device}{threads}, torch {torch.__version__}, Python {platform.python_version()}"
