"""Every error that the package defines, as one tree. What each means and what to do: docs/errors.md.

    ReparamError
    ├── FormatError          (ValueError)          a file of an adapter is damaged, or does not fit the model
    ├── InputDependentError  (ValueError)          no one matrix stands for the update
    ├── BaseError            (ValueError)          a base model cannot be loaded as asked
    ├── DataError            (ValueError)          rows cannot be trained on
    ├── ConfigError          (ValueError)          the configuration is not usable
    ├── StateError           (ValueError)          a training state cannot be saved or used
    ├── RunLocked            (ValueError)          another process runs in the folder
    ├── NotFinite            (FloatingPointError)  the loss or the gradient became NaN or infinite
    ├── NothingLearned       (RuntimeError)        training left the model's outputs as they were
    ├── DiskFull             (OSError)             there was no room for a result
    └── Stopped                                    a signal ended a run

Each is also the built-in error in parentheses, so that code that catches ValueError catches what it always did. A wrong
argument of a function is a plain ValueError.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

SHOWN = 10  # problems that one error message spells out


class ReparamError(Exception):
    """Any error that this package defines; catch it to catch them all."""


class FormatError(ReparamError, ValueError):
    """A file is damaged, or does not fit the model; the message names the file, the tensor or key, and what to do."""


class InputDependentError(ReparamError, ValueError):
    """The update depends on its input, so that no one matrix stands for it: it cannot be merged or banked."""


class BaseError(ReparamError, ValueError):
    """A base model cannot be loaded as asked."""


class DataError(ReparamError, ValueError):
    """Data that cannot be trained on. `problems` holds every finding; the message shows the first ten."""

    def __init__(self, problems: Sequence[str]) -> None:
        assert problems
        self.problems = tuple(problems)
        lines = list(self.problems[:SHOWN])
        if len(self.problems) > SHOWN:
            lines.append(f"... and {len(self.problems) - SHOWN:,} more")
        super().__init__("\n".join(lines))


class ConfigError(ReparamError, ValueError):
    """The configuration is not usable; the message names the key, the file it came from and what was expected."""


class StateError(ReparamError, ValueError):
    """A training state cannot be saved, or what was saved cannot be used."""


class RunLocked(ReparamError, ValueError):  # noqa: N818  (reads as what happened)
    """Another process runs in the folder."""


class NotFinite(ReparamError, FloatingPointError):  # noqa: N818  (reads as what happened)
    """The loss, the penalty or the gradient is NaN or infinite; the weights are those before the step."""

    def __init__(self, message: str, step: int, rows: list[str]) -> None:
        super().__init__(message)
        self.step = step
        self.rows = rows


class NothingLearned(ReparamError, RuntimeError):  # noqa: N818  (reads as what happened)
    """The trained adapter does not change the model's outputs, or was not saved as it was trained."""


class DiskFull(ReparamError, OSError):  # noqa: N818  (reads as what happened)
    """There was no room for a result. Nothing was replaced: what was at the target before is still there."""


class Stopped(ReparamError):  # noqa: N818  (reads as what happened)
    """A signal ended a run, after a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"
