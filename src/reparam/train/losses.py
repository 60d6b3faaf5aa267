"""How a run computes its loss: in chunks of the vocabulary, with Liger's kernel, and with smoothed labels."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from reparam.errors import ConfigError, NotChunked
from reparam.hf import liger
from reparam.hf.chunked import ChunkedLoss
from reparam.train import processes
from reparam.train.job import Job
from reparam.train.show import Show

_AT_ONCE = 2**62  # more tokens than any batch has


def loss_of(job: Job, show: Show) -> contextlib.AbstractContextManager[Any]:
    """A context for training, in which the model computes its loss as configured.

    A model whose loss cannot be computed in chunks computes it as usual, and a note says so. Raises ConfigError if its
    labels are to be smoothed, and if run.liger is set and cannot be used.
    """
    run, smoothing = job.config.run, job.config.optim.label_smoothing
    if not run.chunked_loss and run.liger:
        raise ConfigError("run.liger computes the loss in chunks; leave out run.chunked_loss=false, or run.liger")
    if not run.chunked_loss and not smoothing:
        return contextlib.nullcontext()
    try:
        if torch.cuda.device_count() > 1 and processes.count() == 1:  # transformers uses DataParallel then
            raise NotChunked("one process trains on several devices; start one process for each with torchrun")
        if run.chunked_loss and (found := liger.chosen(job.model, smoothing=smoothing, wish=run.liger)):
            show.note("the loss is computed with Liger's kernel")
            return found
        return ChunkedLoss(job.model, smoothing=smoothing, chunk=None if run.chunked_loss else _AT_ONCE)
    except NotChunked as error:
        if run.liger:
            raise ConfigError(f"run.liger cannot be used: {error}; leave it out") from None
        if smoothing:
            raise ConfigError(f"optim.label_smoothing cannot be used with this model: {error}") from None
        show.note(f"the loss is computed from all logits of a batch at once: {error}")
        return contextlib.nullcontext()
