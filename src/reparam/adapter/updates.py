"""One site of an adapter that was read, as the update that computes it; no model is needed."""

from __future__ import annotations

import torch

from reparam.core.base import Update, Weight
from reparam.errors import FormatError
from reparam.io.record import Record
from reparam.sites.module import SHARED


def update_of(record: Record, name: str, weight: Weight, *, dtype: torch.dtype | None = None) -> Update:
    """The update of the site `name` with its saved values, beside `weight`, its frozen matrix or one in its place.

    What the update shares with other sites has its saved values too. The parameters have the `dtype`, or by default the
    one that the method builds them in. Raises FormatError, with the site, for tensors that do not fit the settings, and
    ValueError where the method has no update for this weight.
    """
    shared = record.method.shared(list(record.sites.values()))
    update = record.method.build(record.sites[name], weight, shared)
    parts = [(name, update), *([] if shared is None else [(SHARED, shared.to(weight.device))])]
    try:
        update.fit(record.of(name))
        for path, part in parts:
            if dtype is not None:
                part.to(dtype)  # before the values are copied, so that none is rounded on the way
            part.load_state_dict(record.of(path))
    except RuntimeError as error:
        raise FormatError(f"{name}: its tensors do not fit its settings: {error}") from error
    return update
