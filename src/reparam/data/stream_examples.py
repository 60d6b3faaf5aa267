"""The examples of a stream: as tensors for a batch, and many of them as few values for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reparam.data.batches import IGNORED


class Example(NamedTuple):
    """An encoded example."""

    ids: np.ndarray
    """Token ids, [T] int32."""
    loss: np.ndarray
    """Which tokens carry loss, [T] bool."""
    source: str
    """Where it comes from, as "file:line"."""
    passes: int
    """Number of passes before the one in which it was read; always 0 with several sources."""


def tensors(example: Example, number: int) -> dict[str, Tensor]:
    """What `Encoded` gives for an example: input_ids and labels, [T] int64, and row, its number."""
    ids = torch.from_numpy(example.ids).long()
    labels = ids.masked_fill(~torch.from_numpy(example.loss), IGNORED)
    return {"input_ids": ids, "labels": labels, "row": torch.tensor(number)}


def flat(examples: Sequence[Example]) -> dict[str, Any]:
    """Examples as few values and tensors."""
    nothing = np.zeros(0, dtype=np.int32)
    return {
        "ids": torch.from_numpy(np.concatenate([nothing, *(example.ids for example in examples)])),
        "loss": torch.from_numpy(np.concatenate([nothing, *(e.loss for e in examples)]).astype(bool)),
        "lengths": [len(example.ids) for example in examples],
        "sources": [example.source for example in examples],
        "passes": [example.passes for example in examples],
    }


def unflat(values: Mapping[str, Any]) -> list[Example]:
    """The inverse of `flat`."""
    ends = np.cumsum(values["lengths"]).tolist()[:-1]
    ids, loss = (np.split(values[key].numpy(), ends) for key in ("ids", "loss"))
    return [
        Example(*each) for each in zip(ids, loss, values["sources"], values["passes"], strict=bool(values["lengths"]))
    ]
