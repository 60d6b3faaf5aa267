"""Build the update of one site from a saved adapter, without a model."""

from __future__ import annotations

import torch

from reparam.core.base import Update, Weight
from reparam.errors import FormatError
from reparam.io.record import Record
from reparam.sites.module import SHARED


def update_of(record: Record, name: str, weight: Weight, *, dtype: torch.dtype | None = None) -> Update:
    """Build the update of the site `name`, and the state that it shares with other sites, with their saved values.

    `weight` is the site's frozen matrix, or a placeholder of the same shape. The parameters have the dtype `dtype`, by
    default the one in which the method builds them. Raises FormatError, naming the site, if the saved tensors do not
    fit the settings, and ValueError if the method cannot build an update for this weight.
    """
    shared = record.method.shared(list(record.sites.values()))
    update = record.method.build(record.sites[name], weight, shared)
    parts = [(name, update), *([] if shared is None else [(SHARED, shared.to(weight.device))])]
    try:
        update.fit(record.of(name))
        for path, part in parts:
            if dtype is not None:
                part.to(dtype)  # before the values are copied, so that the copy does not round them
            part.load_state_dict(record.of(path))
    except RuntimeError as error:
        raise FormatError(f"{name}: the tensors do not fit the adapter's settings: {error}") from error
    return update
