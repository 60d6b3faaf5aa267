"""A run that a signal stops."""

from __future__ import annotations

import os
import signal
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from reparam.train.show import Show


class Stopping(Show):
    """A display that prints nothing, and sends a signal during a step."""

    def __init__(self, console: Console, step: int) -> None:
        super().__init__(console)
        self.step_of_signal = step

    def callback(self, steps: int) -> TrainerCallback:
        stop = self.step_of_signal

        class Send(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step + 1 == stop:
                    os.kill(os.getpid(), signal.SIGTERM)

        return Send()
