"""The output of a training run: the adapter's sites, a preview of the data, progress, and the scores."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from reparam.adapter.quantize import entries, reports
from reparam.core.text import counted
from reparam.data.examples import Examples
from reparam.data.preferences import flat
from reparam.data.preview import preview
from reparam.data.sample import sample
from reparam.evaluation.tables import answers_table, scores_table, short
from reparam.evaluation.terminal import note, say
from reparam.io.outputs import OVERWRITE
from reparam.train import processes
from reparam.train.checkpoint import step_of
from reparam.train.config import dump
from reparam.train.live import Dashboard, Lines, Wait

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import TrainerCallback, TrainerState

    from reparam.adapter.adapter import Adapter
    from reparam.evaluation.score import Answer, Score
    from reparam.optim import Paging
    from reparam.train.checkpoint import Found
    from reparam.train.config import Config
    from reparam.train.job import Job, Result
    from reparam.train.optimizer import Rates
    from reparam.train.sections import RunConfig


class Show:
    """Prints the progress and the result of a training run to a console.

    With `fixed`, the command has no settings for the number of steps, so none is advised.
    """

    def __init__(self, console: Console, *, fixed: bool = False) -> None:
        self.console, self._fixed = console, fixed

    def job(self, job: Job) -> None:
        """Print what will be trained and a preview of the data."""
        trained = sum(p.numel() for p in job.adapter.parameters())
        total = entries(job.model) - trained
        say(self.console, f"{job.adapter.method.name}: {counted(trained, 'parameter')} will be trained, at these sites")
        say(self.console, sites_table(job.adapter))
        say(
            self.console,
            f"that is {trained / total:.2%} of the base model's {total:,} parameters; everything else is frozen",
        )
        if taken := job.adapter.positions:
            say(self.console, f"virtual tokens take {taken} of {job.adapter.context or 'the'} positions of every text")
        for report in reports(job.model):
            say(self.console, str(report))
        say(self.console, f"training rows   {job.train.report}")
        for line in job.train.report.lines:
            say(self.console, f"                {line}")
        if job.packed is not None:
            say(self.console, f"packed          {job.packed}")
        say(self.console, f"held-out rows   {job.valid.report}")
        for line in job.valid.report.lines:
            say(self.console, f"                {line}")
        for warning in (*job.train.report.warnings, *job.valid.report.warnings):
            say(self.console, note("note", warning))
        if isinstance(job.train, Examples):
            say(self.console, sample(job.train, job.tokenizer))
            return
        say(
            self.console,
            preview(flat(job.train), job.tokenizer, rows=max(3, 3 * len(flat(job.train)) // len(job.train))),
        )

    def rates(self, rates: Sequence[Rates]) -> None:
        """Print the parameter groups of LoRA+, if there are any."""
        if rates:
            say(self.console, rates_table(rates))

    def ended(self, early: str | None) -> None:
        """Print the method's note about a run that ended before the method's schedule did, if there is one."""
        if early is not None:
            say(self.console, note("note", early))

    def note(self, text: str) -> None:
        """Print a note about how the run works."""
        say(self.console, note("note", text))

    def told(self, text: str, event: str, **fields: Any) -> None:
        """Print a line; for machines, an event with these fields is printed instead."""
        say(self.console, text)

    def samples(self, answers: Sequence[Answer]) -> None:
        """Print answers to held-out rows, one per line."""
        for given in answers:
            right = "right" if given.right else f"expected {short(given.expected)}"
            say(self.console, f"sample  {short(given.question)} -> {short(given.given)}  ({right})", style="dim")

    def best(self, state: TrainerState, *, run: RunConfig, early: bool) -> None:
        """Print why the run stopped before its last step, and which weights it ends with."""
        if early:
            say(
                self.console,
                f"stopped early at step {state.global_step}: {counted(run.patience, 'evaluation')} in a row "
                f"{'was' if run.patience == 1 else 'were'} no better than the best one",
            )
        if run.keeps_best and state.best_metric is not None:
            step = state.best_global_step
            key, name = f"eval_{run.metric}", run.metric.replace("_", " ").replace("loss", "held-out loss")
            found = [entry[key] for entry in state.log_history if entry["step"] == step and key in entry]
            say(self.console, f"the best weights are those of step {step} ({name} {found[0]:.4f})")

    def worse(self, before: Score, after: Score) -> None:
        """Print a warning if the first held-out score with the adapter is worse than that of the base."""
        if after.worse_than(before):
            say(
                self.console,
                note(
                    "warning",
                    f"the run diverged: the held-out {after.name} is {after.value:.4f} with the adapter and "
                    f"{before.value:.4f} without it; lower the learning rate, or train for fewer steps",
                ),
            )

    def step(self, text: str) -> None:
        """Print the current step of the run."""
        say(self.console, f"{text} ...", style="dim")

    def found(self, found: Found, *, steps: int, before: int, schedule: str) -> None:
        """Print the checkpoint that the run resumes from, those that were skipped, and what remains to be done.

        `steps` is the number of steps of the run, `before` that of the call before, and `schedule` that of the rate.
        """
        for path, reason in found.skipped:
            say(self.console, note("skipped", f"{path}: {reason}"))
        if found.path is not None:
            say(self.console, f"resuming from {found.path}")
            for line in _remaining(step_of(found.path), steps, before, schedule, fixed=self._fixed):
                say(self.console, line)

    def plan(self, config: Config, steps: int, found: Found) -> None:
        """Print the resolved configuration, the steps and the files of a run that `--dry-run` describes."""
        run, tenth = config.run, max(1, steps // 10)
        say(self.console, "resolved configuration")
        say(self.console, "\n".join(f"    {line}".rstrip() for line in dump(config).splitlines()))
        rows = run.batch_size * run.accumulation * processes.count()
        say(
            self.console,
            f"{counted(steps, 'step')} of {counted(rows, 'row')}, with an evaluation every {run.eval_every or tenth} "
            f"and a checkpoint every {run.save_every or tenth} steps",
        )
        self.found(found, steps=steps, before=steps, schedule=config.optim.schedule)
        folder = Path(run.output)
        names = ("adapter", "config.toml", "run.json", "figures.json", "loss.png", "checkpoint-N")
        say(self.console, f"files           {folder}/{{{', '.join(names)}}}")
        say(self.console, f"dry run: nothing was trained, and nothing was written to {folder}")

    def callback(self, steps: int) -> TrainerCallback:
        """A callback that shows the progress of a Trainer over `steps` steps."""
        if self.console.quiet:
            return Wait(self.console, steps)
        return (Dashboard if self.console.is_terminal else Lines)(self.console, steps)

    def scores(self, result: Result) -> None:
        """Print the scores before and after training, and up to five answers."""
        say(self.console, scores_table(result.before, result.after))
        if result.answers:
            say(self.console, answers_table(result.answers[:5]))

    def result(self, result: Result, difference: float) -> None:
        """Print the scores before and after training, up to five answers, and the paths of the results."""
        self.scores(result)
        say(
            self.console,
            f"The saved adapter was read back: its outputs equal those of the trained one bit for bit, and it changes "
            f"logits by up to {difference:.3g}.",
        )
        if result.paging is not None:
            say(self.console, paging_line(result.paging))
        say(self.console, f"adapter        {result.folder / 'adapter'}")
        say(self.console, f"figures, plot  {result.folder / 'figures.json'}, {result.folder / 'loss.png'}")


def _remaining(done: int, steps: int, before: int, schedule: str, *, fixed: bool) -> list[str]:
    """Sentences about a run that has done some steps, and had `before` steps in the call before."""
    if done >= steps:
        further = "" if fixed else "raise run.max_steps or run.epochs to train further, or "
        return [
            f"the run is finished ({done} of {steps} steps), so nothing is trained; {further}pass {OVERWRITE} to start "
            f"anew"
        ]
    if steps == before:
        return []
    rates = "" if schedule == "constant" else f", at the rates of the {schedule} schedule of {steps} steps"
    other = "" if schedule == "constant" else f"; a run that had {steps} steps from its start would have other rates"
    return [f"the run had {before} steps and goes on from step {done} to step {steps}{rates}{other}"]


def sites_table(adapter: Adapter) -> Table:
    """A table of the adapter's sites, grouped by the last part of their path: count, shapes, trained parameters."""
    count: Counter[str] = Counter()
    shapes: dict[str, set[str]] = {}
    parameters: Counter[str] = Counter()
    for name, site in adapter.sites.items():
        end = name.rsplit(".", 1)[-1]
        count[end] += 1
        shapes.setdefault(end, set()).add(f"{site.out_features} x {site.in_features}")
    for name, parameter, _ in adapter.named_parameters():
        site_name = next((s for s in (*adapter.sites, *adapter.replaced) if name.startswith(s + ".")), name)
        parameters[site_name.rsplit(".", 1)[-1]] += parameter.numel()
    table = Table()
    for column in ("sites", "count", "W (out x in)", "parameters"):
        table.add_column(column, justify="right" if column in ("count", "parameters") else "left")
    for end in parameters:
        shape = ", ".join(sorted(shapes.get(end, {"trained in full"})))
        table.add_row(end, str(count[end] or 1), shape, f"{parameters[end]:,}")
    return table


def rates_table(rates: Sequence[Rates]) -> Table:
    """A table of the parameter groups of LoRA+: peak learning rate, its ratio, weight decay, number of parameters."""
    table = Table()
    for column in ("LoRA+ group", "learning rate", "ratio", "weight decay", "parameters"):
        table.add_column(column, justify="left" if column == "LoRA+ group" else "right")
    for group in rates:
        cells = (f"{group.rate:g}", f"{group.multiple:g}", f"{group.weight_decay:g}", f"{group.parameters:,}")
        table.add_row(group.name, *cells)
    return table


def paging_line(paging: Paging) -> str:
    """One line with the statistics of a paged optimizer."""
    here, total, read, written = (
        f"{count / 2**20:.2f} MiB" for count in (paging.peak_resident, paging.total, paging.bytes_in, paging.bytes_out)
    )
    return (
        f"optimizer      at most {here} of {total} of states on the device; {read} read back, {written} written; "
        f"{counted(paging.faults, 'page fault')}, {counted(paging.prefetched, 'page')} prefetched, "
        f"{paging.evictions:,} evicted"
    )
