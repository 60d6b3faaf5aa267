"""The contrastive loss waits until experts have outputs to compare: its gradient grows as 1 / |B|, and B is 0 at first.

It is off for the first part of the steps of an optimizer whose number of steps is known, and on otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from reparam.methods.mixture.common import Common


class Warmup:
    """A controller that counts steps; `share` is the part of them that the loss is off for."""

    def __init__(self, common: Common, share: float) -> None:
        self.common = common
        self.share = share
        self.after = 0
        self.steps = 0

    def plan(self, total_steps: int | None) -> None:
        """Choose the step from which on the loss counts; 0 where the number of steps is not known."""
        self.after = math.ceil(self.share * total_steps) if total_steps is not None else 0
        self._decide()

    def before_step(self) -> None:
        """Do nothing: only finished steps count."""

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count the step, and switch the loss on when its time has come."""
        self.steps += 1
        self._decide()

    def finish(self) -> str | None:
        """A sentence where training ended before the loss began."""
        if self.steps < self.after:
            return f"the contrastive loss was to begin after step {self.after}, and there were {self.steps} steps"
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
