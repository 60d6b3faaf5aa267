"""The reward of generated answers: a function in a Python file that the user names on the command line."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reparam.core.checks import nearest
from reparam.errors import ConfigError
from reparam.io.staged import digest

EXAMPLE = "--reward rewards.py:score"


class Reward:
    """A reward function of TRL: called with lists, it returns a number for each answer.

    Args:
        place: FILE.py:function. The file is imported.

    Raises:
        ConfigError: another form, no such file or function, or a file that cannot be imported.
    """

    def __init__(self, place: str) -> None:
        file, name = _parts(place)
        self.__name__ = name  # TRL logs under it
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ConfigError(f"prefer.reward: {file} cannot be imported: {_told(error)}") from error
        found = getattr(module, name, None)
        if not callable(found):
            names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
            raise ConfigError(f"prefer.reward: {file} has no function {name!r}{nearest(name, names)}")
        self._function: Callable[..., Any] = found
        if inspect.iscoroutinefunction(found):
            raise ConfigError(f"prefer.reward: {name} is asynchronous; give a plain function")

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float]:
        """The rewards of answers, as many as there are. `columns` are TRL's: prompts, completion_ids, keys of rows.

        Raises RuntimeError if the function fails, or returns something else than a finite number for each answer.
        """
        accepted = inspect.signature(self._function).parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
            columns = {key: value for key, value in columns.items() if key in accepted}
        try:
            found = self._function(completions=completions, **columns)
            rewards = [float(value) for value in found]
        except Exception as error:
            raise RuntimeError(f"the reward function {self.__name__} failed: {_told(error)}") from error
        if len(rewards) != len(completions) or not all(map(math.isfinite, rewards)):
            raise RuntimeError(
                f"the reward function {self.__name__} returned {found!r} for {len(completions)} answers; it must "
                f"return one finite number for each"
            )
        return rewards


def code_of(place: str) -> str:
    """What determines the rewards, for the identity of a run: the function's name and the digest of its file."""
    file, name = _parts(place)
    return f"{name} {digest(file)}"


def _parts(place: str) -> tuple[Path, str]:
    file, _, name = place.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ConfigError(f"prefer.reward: {place!r}: expected FILE.py:function, such as {EXAMPLE}")
    if not Path(file).is_file():
        raise ConfigError(f"prefer.reward: {file}: no such file")
    return Path(file), name


def _told(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
