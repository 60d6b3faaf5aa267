"""The model before training, as the same model with another selection: there is no second copy of the weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from reparam.adapter.selection import select, state_of
from reparam.adapter.without_sites import read_back
from reparam.io.files import adapter_folder
from reparam.train.job import Job

NAME = "__reference"  # under which the adapter that a run starts from is loaded once more, frozen


def before_training(job: Job) -> str | None:
    """The name of the adapter that makes the model what it was before training; None for the base alone.

    A new adapter changes no output, so the base is the model before training. (New virtual tokens do change outputs;
    their reference is the base, too, as in TRL.) A run that trains a finished adapter further (`adapter.start`) has a
    frozen copy of this adapter, as TRL has.
    """
    start = job.config.adapter.start
    if start is None:
        return None
    if NAME not in state_of(job.model).adapters:
        read_back(job.adapter, adapter_folder(start), name=NAME)
    return NAME


class Reference(nn.Module):
    """The model before training, in evaluation mode, as a model of its own for TRL: it has no parameters.

    TRL and accelerate replace `forward` of the models that they are given. Calls do not go through it here, but to the
    model in training, whose `forward` they replace in the same way.
    """

    def __init__(self, model: nn.Module, name: str | None) -> None:
        super().__init__()
        self._held = (model,)  # in a tuple, so that it is no submodule
        self.config = model.config
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model as it was before training."""
        model = self._held[0]
        training = model.training
        model.eval()
        try:
            with select(model, self.name):
                return model(*args, **kwargs)
        finally:
            model.train(training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As a call."""
        return self(*args, **kwargs)
