"""What ends a run early without harm: signals, and losses or gradients that are not finite."""

import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType

import torch
from torch import Tensor

from reparam.errors import NotFinite
from reparam.train.checkpoint import newest


class Interrupts:
    """Notes SIGINT and SIGTERM while its block runs, so that the loop can end where it is safe.

    A SIGINT after another signal raises KeyboardInterrupt at once. Signals that the process ignores stay ignored, and
    outside the main thread nothing is changed, because Python handles signals there.
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
        """The signal that any of the processes received: all have to leave the loop after the same step."""
        if processes > 1:
            number = torch.tensor(int(self.received or 0), device=device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            self.received = signal.Signals(int(number)) if number else None
        return self.received


class Finite:
    """Checks the numbers of one step after the other, and knows which rows they come from.

    Args:
        run_folder: where the checkpoints are that can be gone back to.
        row_names: what an index means to the user, as "file:line"; without it the index itself is named.
    """

    def __init__(self, run_folder: Path, row_names: Callable[[int], str] | Sequence[str] | None) -> None:
        self.run_folder = run_folder
        self.row_names = row_names
        self.batches: list[Tensor | None] = []
        """Indices of the rows of each micro-batch of the step so far, [B] each."""

    def check(self, what: str, value: Tensor, *, step: int, of: int, whole_step: bool = False) -> None:
        """Raise NotFinite unless all of `value` is finite.

        Args:
            what: "loss", "penalty", "gradient".
            value: of the last micro-batch, or of all of them with `whole_step`.
            step: the optimizer step that is being computed, from 1.
            of: number of micro-batches in the step.
            whole_step: whether every row of the step can be the cause.
        """
        value = value.detach()
        if torch.isfinite(value).all():
            return
        batches = self.batches if whole_step else self.batches[-1:]
        rows = [self._name(index) for batch in batches if batch is not None for index in batch.tolist()]
        part = "" if whole_step or of == 1 else f" (micro-batch {len(self.batches)} of {of})"
        where = f", in the rows {', '.join(rows)}" if rows else ""
        kept = newest(self.run_folder).path
        raise NotFinite(
            f"the {what} is {float(value.mean())} at step {step}{part}{where}. The weights were not changed by it; "
            + (f"the last good checkpoint is {kept}. " if kept else "there is no checkpoint yet. ")
            + "Look at these rows, or lower the learning rate",
            step,
            rows,
        )

    def _name(self, index: int) -> str:
        if self.row_names is None:
            return str(index)
        return self.row_names(index) if callable(self.row_names) else self.row_names[index]
