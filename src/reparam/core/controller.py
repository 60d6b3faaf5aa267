"""The interface of a method's actions before and after an optimizer step."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Controller(Protocol):
    """A method's actions before and after each optimizer step, with the state that a checkpoint saves for them."""

    def plan(self, total_steps: int | None) -> None:
        """Called before the first step with the number of steps, if known. Raises ValueError if it does not fit."""

    def before_step(self) -> None:
        """Called before each step, when the gradients have been computed."""

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Called after each step, with the optimizer that made it."""

    def finish(self) -> str | None:
        """Called at the end of training. Returns a message for the user if training ended too early, or None."""

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` needs to continue exactly: tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
