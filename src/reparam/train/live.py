"""The progress of training: lines, a dashboard on a terminal, or lines of JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from transformers import TrainerCallback

from reparam.core.progress import waiting
from reparam.evaluation.terminal import say, say_line

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 48  # characters of a sparkline


MEASURED = {
    "exact match": ("eval_exact_match",),
    "margin": ("eval_rewards/margins", "eval_reward_margin"),
    "accuracy": ("eval_rewards/accuracies", "eval_reward_accuracy"),
    "mean reward": ("eval_mean_reward",),
}
"""What evaluations measure beside the loss, by keys of the log entry: TRL's mean over batches, reparam's over rows."""


class Progress(TrainerCallback):
    """Collects the figures of a run while it trains; subclasses show them.

    Attributes:
        step: number of finished steps.
        steps: number of steps of the run.
        losses: the logged training losses of this call, in nats per token.
        held_out: the losses of the held-out rows.
        speed: tokens per second since the log entry before, or None.
        rate: the learning rate.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self.console, self.step, self.steps = console, 0, steps
        self.losses: list[float] = []
        self.held_out: list[float] = []
        self.measured: dict[str, float] = {}
        self.speed: float | None = None
        self.rate: float | None = None
        self._began = self._since = time.monotonic()
        self._tokens = self._first = 0

    def seconds_left(self) -> float | None:
        """The time that the remaining steps take at the pace so far, in seconds; None before the first step."""
        done = self.step - self._first
        return (time.monotonic() - self._began) / done * (self.steps - self.step) if done > 0 else None

    def memory(self) -> int:
        """Bytes in use: the most that was allocated on the accelerator or, on a CPU, the process' own now."""
        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
        return int(psutil.Process().memory_info().rss)

    def opened(self) -> None:
        """Training begins."""

    def advanced(self) -> None:
        """A step is finished."""

    def logged(self) -> None:
        """There is a new training loss."""

    def evaluated(self) -> None:
        """There is a new held-out loss."""

    def closed(self) -> None:
        """Training has ended."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the step that a resumed run begins with."""
        self._began = self._since = time.monotonic()
        self.step = self._first = state.global_step
        self.steps, self._tokens = state.max_steps, int(state.num_input_tokens_seen)
        self.opened()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the number of the step."""
        self.step = state.global_step
        self.advanced()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take a loss, the learning rate and the number of tokens from a log entry."""
        logs = logs or {}
        self.step = state.global_step
        if "loss" in logs:
            now, seen = time.monotonic(), int(state.num_input_tokens_seen)
            self.speed = (seen - self._tokens) / max(now - self._since, 1e-9)
            self._tokens, self._since = seen, now
            self.rate = logs.get("learning_rate")
            self.losses.append(logs["loss"])
            self.logged()
        if "eval_loss" in logs:
            self.held_out.append(logs["eval_loss"])
            self.measured = {name: logs[key] for name, keys in MEASURED.items() for key in keys if key in logs}
            self.evaluated()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Training has ended."""
        self.closed()


class Lines(Progress):
    """One line for each loss."""

    def logged(self) -> None:
        """Print the loss, the speed and the time left."""
        left = self.seconds_left()
        ending = "" if left is None else f"  {duration(left)} left"
        place = f"step {self.step}/{self.steps}"
        say(self.console, f"{place}  loss {self.losses[-1]:.4f}  {self.speed or 0:,.0f} tokens/s{ending}")

    def evaluated(self) -> None:
        """Print the held-out loss."""
        others = "".join(f"  {name} {value:.3f}" for name, value in self.measured.items())
        say(self.console, f"step {self.step}/{self.steps}  held-out loss {self.held_out[-1]:.4f}{others}")


class Dashboard(Progress):
    """Losses as sparklines, speed, memory and the time left, updated in place on a terminal."""

    def __init__(self, console: Console, steps: int) -> None:
        super().__init__(console, steps)
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4)

    def render(self) -> RenderableType:
        """Render the figures as they are."""
        left = self.seconds_left()
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(1, self.steps), completed=self.step, width=WIDTH)
        ending = "" if left is None else f"{duration(left)} left"
        head.add_row("training", bar, f"{self.step}/{self.steps}", ending)
        body = Table.grid(padding=(0, 1))
        for name, losses in (("loss", self.losses), ("held out", self.held_out)):
            last = f"{losses[-1]:.4f}" if losses else "-"
            body.add_row(f"{name:<8}", f"{last:>8}", sparkline(losses))
        speed = "-" if self.speed is None else f"{self.speed:,.0f}"
        rate = "" if self.rate is None else f"   learning rate {self.rate:.2e}"
        return Group(head, body, f"{speed} tokens/s   memory {self.memory() / 2**20:,.0f} MiB{rate}")

    def opened(self) -> None:
        """Show the dashboard."""
        self._live.start()

    def closed(self) -> None:
        """Leave the last figures on the terminal."""
        self._live.stop()


class Wait(Progress):
    """A wait for the steps of a run that is one part of a longer command, which prints its result."""

    def __init__(self, console: Console, steps: int) -> None:
        super().__init__(console, steps)
        self._held, self._shown = ExitStack(), 0

    def opened(self) -> None:
        """Begin the wait."""
        self._advance = self._held.enter_context(waiting("training", self.steps, unit="steps"))
        self._shown = 0
        self.advanced()

    def advanced(self) -> None:
        """Show the number of steps."""
        self._advance(self.step - self._shown)
        self._shown = self.step

    def closed(self) -> None:
        """End the wait."""
        self._held.close()


class JsonLines(Progress):
    """One line of JSON for each loss; docs/files.md lists the fields."""

    def _place(self, event: str) -> dict[str, Any]:
        return {"event": event, "step": self.step, "steps": self.steps}

    def logged(self) -> None:
        """Print the loss with the speed, the memory and the time left."""
        figures = {
            "loss": self.losses[-1],
            "learning_rate": self.rate,
            "tokens_per_second": self.speed,
            "seconds_left": self.seconds_left(),
            "memory_bytes": self.memory(),
        }
        say_line(self.console, self._place("progress") | figures)

    def evaluated(self) -> None:
        """Print the held-out loss."""
        measured = {name.replace(" ", "_"): value for name, value in self.measured.items()}
        say_line(self.console, self._place("evaluation") | {"held_out_loss": self.held_out[-1]} | measured)


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """A row of up to `width` bars, between the smallest and the largest value. More values are averaged in groups.

    >>> sparkline([3, 2, 1, 0])
    '█▆▃▁'
    """
    if not values:
        return ""
    size = math.ceil(len(values) / width)
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    means = [sum(group) / len(group) for group in groups]
    known = [mean for mean in means if math.isfinite(mean)] or [0.0]
    low, spread = min(known), max(known) - min(known) or 1.0
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round((mean - low) / spread * top)] if math.isfinite(mean) else "?" for mean in means)


def duration(seconds: float) -> str:
    """A duration in words.

    >>> duration(61.2), duration(7300)
    ('1 min 2 s', '2 h 1 min')
    """
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, short = divmod(minutes, 60)
    return f"{hours} h {short} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
