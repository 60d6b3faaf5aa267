"""What a method does around an optimizer step."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Controller(Protocol):
    """What must happen around an optimizer step, and the state that a checkpoint needs for it."""

    def plan(self, total_steps: int | None) -> None:
        """Called before the first step, with their number if it is known. Raises ValueError where it will not do."""

    def before_step(self) -> None:
        """Called with the gradients in place."""

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Called after the parameters have moved, with the optimizer that moved them."""

    def finish(self) -> str | None:
        """Called at the end of training. A sentence for the user, where it ended before its time, or None."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue exactly; tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
