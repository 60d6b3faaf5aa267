"""Stop a run safely: after a signal, or when a loss or gradient is not finite."""

import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType, TracebackType

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback

from reparam.errors import NotFinite
from reparam.train import processes
from reparam.train.checkpoint import newest


def stopped_early(callbacks: Iterable[TrainerCallback]) -> bool:
    """Whether so many evaluations were no better than an earlier one that early stopping has ended the run."""
    return any(
        callback.early_stopping_patience_counter >= callback.early_stopping_patience
        for callback in callbacks
        if isinstance(callback, EarlyStoppingCallback)
    )


class Interrupts:
    """Records SIGINT and SIGTERM inside its `with` block, so that the training loop can stop at a safe point.

    A SIGINT after another signal raises KeyboardInterrupt immediately. Signals that the process ignores stay ignored.
    Outside the main thread this class does nothing, because Python handles signals only in the main thread.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "Interrupts":
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.getsignal(number)
                if self._before[number] != signal.SIG_IGN:
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def agreed(self, processes: int, device: torch.device) -> signal.Signals | None:
        """The signal that any of the processes received, or None; all processes must stop after the same step."""
        if processes > 1:
            number = torch.tensor(int(self.received or 0), device=device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            self.received = signal.Signals(int(number)) if number else None
        return self.received


class Finite:
    """Checks that losses and gradients are finite; its errors name the rows of the step.

    Args:
        run_folder: folder of the checkpoints; errors name the newest one.
        row_names: the name of each row index, such as "file:line"; by default the index itself.
    """

    def __init__(self, run_folder: Path, row_names: Callable[[int], str] | Sequence[str] | None) -> None:
        self.run_folder = run_folder
        self.row_names = row_names
        self.batches: list[Tensor | None] = []
        """Row indices, [B] int64, of each micro-batch of the current step so far."""

    def check(self, what: str, value: Tensor, *, step: int, of: int, whole_step: bool = False) -> None:
        """Raise NotFinite unless all of `value` is finite; of several processes, the first one raises it for all.

        Args:
            what: "loss", "penalty" or "gradient"; used in the message.
            value: the value of the last micro-batch or, with `whole_step`, of the whole step.
            step: number of the current optimizer step, from 1.
            of: number of micro-batches in the step.
            whole_step: name the rows of all micro-batches of the step, not only those of the last one.
        """
        value = value.detach()
        if torch.isfinite(value).all():
            return
        batches = self.batches if whole_step else self.batches[-1:]
        rows = [self._name(index) for batch in batches if batch is not None for index in batch.tolist()]
        part = "" if whole_step or of == 1 else f" (micro-batch {len(self.batches)} of {of})"
        rows = [row for own in processes.all_of(rows) for row in own]
        where = f", in the rows {', '.join(rows)}" if rows else ""
        kept = newest(self.run_folder).path
        error = NotFinite(
            f"the {what} is {float(value.mean())} at step {step}{part}{where}. This step did not change the weights; "
            + (f"the last good checkpoint is {kept}. " if kept else "there is no checkpoint yet. ")
            + "Check these rows, or lower the learning rate",
            step,
            rows,
        )
        raise processes.for_user(error)

    def _name(self, index: int) -> str:
        if self.row_names is None:
            return str(index)
        return self.row_names(index) if callable(self.row_names) else self.row_names[index]
