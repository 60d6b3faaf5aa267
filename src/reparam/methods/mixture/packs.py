"""Packed batches: where the sequences are that a row holds end to end, for gates that read whole sequences.

Shapes: B rows of a batch, L tokens of a row, S sequences, M tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Packs:
    """The sequences of a packed batch, in the order of the rows.

    `position_ids` [B, L] start again at each sequence. Zeros at the end of a row are padding, as `PackedCollator` makes
    it.

    >>> packs = Packs(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]))
    >>> packs.places.tolist()
    [[0, 1, 2], [3, 4, -1], [5, 6, -1]]
    >>> packs.to_tokens(torch.tensor([[1.0], [2.0], [3.0]]))[:, 0].tolist()
    [1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    """

    places: Tensor
    """The index in the flattened batch of each token of each sequence, [S, M] int64; -1 at padding."""
    mask: Tensor
    """Which tokens of the batch are not padding, [B, L] bool."""

    def __init__(self, position_ids: Tensor) -> None:
        after = (position_ids != 0).flip(-1).cumsum(-1).flip(-1)  # tokens from here on that are not at position 0
        padding = after == 0
        padding[:, 0] = False
        begins = _begins(position_ids) & ~padding
        self.mask = ~padding
        self._numbers = begins.flatten().cumsum(0) - 1  # [B L]; padding counts to the sequence before it
        tokens = self.mask.flatten().nonzero()[:, 0]
        starts = begins.flatten().nonzero()[:, 0]
        numbers = self._numbers[tokens]
        within = tokens - starts[numbers]
        self.places = tokens.new_full((len(starts), int(within.max()) + 1), -1)
        self.places[numbers, within] = tokens

    def __len__(self) -> int:
        return len(self.places)

    @property
    def there(self) -> Tensor:
        """Which places of `apart` hold a token, [S, M] bool."""
        return self.places >= 0

    def fits(self, lead: torch.Size) -> bool:
        """Whether these are the leading dimensions, [B, L] or [B L], of values of all tokens."""
        return lead == self.mask.shape or lead == self._numbers.shape

    def apart(self, values: Tensor) -> Tensor:
        """Values [B, L, I] or [B L, I] of the tokens -> [S, M, I], 0 at padding."""
        flat = values.reshape(-1, values.shape[-1])
        return flat[self.places.clamp(min=0)].masked_fill(~self.there[..., None], 0)

    def to_tokens(self, values: Tensor) -> Tensor:
        """Values [S, ...] of the sequences -> [B L, ...]."""
        return values[self._numbers]

    def of_sequences(self, values: Tensor) -> Tensor:
        """Values [B, L] of the tokens -> [S], those of the first token of each sequence."""
        return values.flatten()[self.places[:, 0]]


def packs_of(inputs: Mapping[str, Any]) -> Packs | None:
    """The sequences of a batch, from the arguments of the model; None if each row is one.

    As in transformers, rows are packed if the position ids start again, and there is neither a mask nor a cache.
    """
    positions, others = inputs.get("position_ids"), (inputs.get("attention_mask"), inputs.get("past_key_values"))
    if not isinstance(positions, Tensor) or positions.ndim != 2 or any(other is not None for other in others):
        return None
    return Packs(positions) if bool(_begins(positions)[:, 1:].any()) else None


def _begins(position_ids: Tensor) -> Tensor:
    """Which tokens begin a sequence, or are padding, [B, L] bool."""
    first = torch.ones_like(position_ids[:, :1], dtype=torch.bool)
    return torch.cat([first, position_ids.diff(dim=-1) != 1], dim=-1)
