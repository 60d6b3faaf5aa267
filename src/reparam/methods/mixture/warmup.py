"""Warmup of the contrastive loss: it is off at first, because its gradient grows as 1 / |B| and B starts at 0.

If the number of optimizer steps is known, the loss is off for the first share of them; otherwise it is always on.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from reparam.methods.mixture.common import Common


class Warmup:
    """A `Controller` that turns the contrastive loss on after a share (0 to 1) of the optimizer steps."""

    def __init__(self, common: Common, share: float) -> None:
        self.common = common
        self.share = share
        self.after = 0
        self.steps = 0

    def plan(self, total_steps: int | None) -> None:
        """Set the number of steps without the loss; 0 if `total_steps` is None."""
        self.after = math.ceil(self.share * total_steps) if total_steps is not None else 0
        self._decide()

    def before_step(self) -> None:
        """Do nothing: only finished steps are counted."""

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count the step, and turn the loss on when the warmup is over."""
        self.steps += 1
        self._decide()

    def finish(self) -> str | None:
        """A warning for the user if training ended before the loss was on, else None."""
        if self.steps < self.after:
            return (
                f"the contrastive loss never began: it starts after step {self.after}, and there were {self.steps} "
                "steps; train longer, or lower contrastive_warmup"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """The number of optimizer steps made so far, under "steps"."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.steps = state["steps"]
        self._decide()

    def _decide(self) -> None:
        self.common.contrasts = self.steps >= self.after
