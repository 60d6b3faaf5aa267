"""What the Trainer does between the steps of a run: stop after a signal, and save where a resumed run can go on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from reparam.train.guard import Finite, Interrupts
from reparam.train.order import begin_epoch

_log = logging.getLogger(__name__)


class BetweenSteps(TrainerCallback):
    """Add it last, so that it sees the decisions of all other callbacks. `begin` is called when training begins."""

    def __init__(self, interrupts: Interrupts, finite: Finite, *, begin: Callable[[], object]) -> None:
        self.stopping = False
        """Whether a signal has ended the run."""
        self._interrupts, self._finite, self._begin = interrupts, finite, begin
        self._save_after_epoch = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the progress of a resumed run, and the order of rows in its epoch."""
        self._begin()
        begin_epoch(kwargs["train_dataloader"], int(state.epoch or 0))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the rows of the step before."""
        self._finite.batches.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if any process got a signal."""
        received = self._interrupts.agreed(args.world_size, args.device)
        if received is not None:
            if state.is_world_process_zero:
                _log.warning("%s: stopping after step %d", received.name, state.global_step)
            self.stopping = control.should_training_stop = True
        # The log entry and evaluation at the end of an epoch follow this event. A run that resumes from a checkpoint
        # saved before them would skip them, so the save is moved to the end of the epoch.
        self._save_after_epoch = control.should_save and float(state.epoch).is_integer()
        control.should_save = control.should_save and not self._save_after_epoch

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save, if the last step of the epoch was to be saved."""
        if self._save_after_epoch:
            control.should_save = True
        if self.stopping and not float(state.epoch).is_integer():
            # transformers treats every stop as the end of an epoch; the resumed run will reach the real end.
            control.should_log = control.should_evaluate = control.should_save = False
