"""All exceptions that the package defines. docs/errors.md explains what each means and what to do.

    ReparamError
    ├── FormatError          (ValueError)          an adapter file is damaged or does not fit the model
    ├── InputDependentError  (ValueError)          the update depends on its input and has no matrix
    ├── BaseError            (ValueError)          the base model cannot be loaded with these settings
    ├── DataError            (ValueError)          the data has rows that cannot be trained on
    ├── ConfigError          (ValueError)          the configuration is invalid
    ├── DuplicateKey         (ValueError)          a JSON object has a key twice
    ├── ExportError          (ValueError)          another program cannot take the adapter or model
    ├── NotChunked           (ValueError)          a model's loss cannot be computed in chunks of logits
    ├── StateError           (ValueError)          a training state cannot be saved or restored
    ├── RunLocked            (ValueError)          another process is using the run folder
    ├── Refused              (ValueError)          a request that the serving engine cannot answer
    │   └── UnknownAdapter   (Refused)             no adapter has the name that a request gives
    ├── Unavailable          (RuntimeError)        the serving engine is full, starts again, or is closed
    │   └── Busy             (Unavailable)         the serving engine has as many open requests as it may
    ├── ClientGone           (ConnectionError)     a client has closed its connection before it had its answer
    ├── AnswerFailed         (RuntimeError)        the serving engine failed while it computed an answer
    ├── WorkerLost           (RuntimeError)        a process that encodes rows ended early
    ├── NotFinite            (FloatingPointError)  the loss or the gradient became NaN or infinite
    ├── NothingLearned       (RuntimeError)        training did not change the model's outputs
    ├── DiskFull             (OSError)             the disk has no room for a result
    ├── WriteFailed          (OSError)             a result cannot be written
    └── Stopped                                    a signal stopped the run

Each class also inherits from the built-in exception in parentheses, so `except ValueError` catches it too. A wrong
function argument raises a plain ValueError.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

SHOWN = 10  # the most problems that one error message lists
_LONGEST = 4000  # characters of an error message; files can hold names of any length


class ReparamError(Exception):
    """Base class of all errors that this package defines.

    The message is one line of at most 4,000 characters, whatever names the files hold: a longer one loses its middle,
    and control characters are written as escapes.
    """

    def __str__(self) -> str:
        return self._line(super().__str__())

    @staticmethod
    def _line(text: str) -> str:
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST - 1000]} ... {text[5 - 1000 :]}"
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class FormatError(ReparamError, ValueError):
    """A file is damaged or does not fit the model. The message names the file, the tensor or key, and the remedy."""


class InputDependentError(ReparamError, ValueError):
    """The update depends on its input, so it has no matrix ΔW: it cannot be merged or used in a mixed batch."""


class ExportError(ReparamError, ValueError):
    """Another program cannot take the adapter or the model. The message says what it lacks, and what to do instead."""


class BaseError(ReparamError, ValueError):
    """The base model or its tokenizer cannot be loaded with these settings."""


class DataError(ReparamError, ValueError):
    """The data has rows that cannot be trained on. `problems` lists all of them; the message shows the first ten."""

    def __init__(self, problems: Sequence[str]) -> None:
        assert problems
        self.problems = tuple(problems)
        lines = list(self.problems[:SHOWN])
        if len(self.problems) > SHOWN:
            lines.append(f"... and {len(self.problems) - SHOWN:,} more")
        super().__init__("\n".join(lines))
        self._lines = lines

    def __str__(self) -> str:
        return "\n".join(map(self._line, self._lines))

    def __reduce__(self) -> tuple[type[DataError], tuple[Sequence[str]]]:
        return type(self), (self.problems,)


class ConfigError(ReparamError, ValueError):
    """The configuration is invalid. The message names the key, the file that sets it and the expected value."""


class DuplicateKey(ReparamError, ValueError):  # noqa: N818  (reads as what happened)
    """A JSON object has a key twice. Errors of files begin with the place, and end with this message."""


class NotChunked(ReparamError, ValueError):  # noqa: N818  (a property of the model)
    """The model computes its loss in a way that `ChunkedLoss` cannot follow; the message is the end of a sentence."""


class StateError(ReparamError, ValueError):
    """A training state cannot be saved, or a saved training state cannot be restored."""


class RunLocked(ReparamError, ValueError):  # noqa: N818  (reads as what happened)
    """Another process is using the run folder."""


class Refused(ReparamError, ValueError):  # noqa: N818  (reads as what happened)
    """The serving engine cannot answer this request; the message names what is wrong in it. Nothing was computed."""


class UnknownAdapter(Refused):
    """No adapter has the name that a request gives. The base never answers instead."""


class Unavailable(ReparamError, RuntimeError):  # noqa: N818  (reads as what happened)
    """The serving engine takes no request: it is full, starts again after a fault, or is closed. Try again later."""


class Busy(Unavailable):
    """The serving engine has as many open requests as it may. Try again when some of them have ended."""


class ClientGone(ReparamError, ConnectionError):  # noqa: N818  (reads as what happened)
    """A client of `reparam serve` has closed its connection before it had its answer."""


class AnswerFailed(ReparamError, RuntimeError):  # noqa: N818  (reads as what happened)
    """The serving engine failed while it computed an answer, or an adapter's scores are not numbers."""


class WorkerLost(ReparamError, RuntimeError):  # noqa: N818  (reads as what happened)
    """A process that encodes rows ended early."""


class NotFinite(ReparamError, FloatingPointError):  # noqa: N818  (reads as what happened)
    """The loss, the penalty or the gradient is NaN or infinite. The weights are those from before the step.

    `step` is the number of that optimizer step; `rows` names the data rows in its batch.
    """

    def __init__(self, message: str, step: int, rows: list[str]) -> None:
        super().__init__(message)
        self.step = step
        self.rows = rows


class NothingLearned(ReparamError, RuntimeError):  # noqa: N818  (reads as what happened)
    """The trained adapter does not change the model's outputs, or the saved adapter differs from the trained one."""


class DiskFull(ReparamError, OSError):  # noqa: N818  (reads as what happened)
    """The disk has no room for a result. Existing files were not replaced."""


class WriteFailed(ReparamError, OSError):  # noqa: N818  (reads as what happened)
    """A result cannot be written: no permission, a failing disk, a name too long. Existing files were not replaced."""


class Stopped(ReparamError):  # noqa: N818  (reads as what happened)
    """A signal stopped the run after it wrote a checkpoint. `number` is the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"
