"""The inputs of trial runs: those of a model with another first row, or with equal tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reparam.adapter.spans import token_dimension

IDS = ("input_ids", "decoder_input_ids")


@dataclasses.dataclass
class Inputs:
    """The arguments of a model's forward, its main input among them, and the lengths of the rows of a packed batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: Tensor
    packed: tuple[int, ...] | None

    def of_first(self, value: Tensor) -> tuple[slice, ...] | None:
        """Which part of a tensor belongs to the first row of the batch; None if the tensor has no rows."""
        if self.packed is None:
            return (slice(1),) if value.ndim > 0 and len(value) == len(self.batch) else None
        dim = token_dimension(value, sum(self.packed))
        return None if dim is None else (*[slice(None)] * dim, slice(self.packed[0]))

    def with_another_first_row(self, special: set[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tokens (but for the special ones) and other numbers in the first row."""

        def change(value: Tensor, first: tuple[slice, ...]) -> Tensor:
            value = value.clone()
            value[first] = _other(value[first], special)
            return value

        return self._changed(change)

    def with_one_token(self, special: set[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the same token everywhere (but for the special ones), and the same numbers."""
        return self._changed(lambda value, _: _one_token(value, special, tokens=self.packed is not None))

    def _changed(self, change: Callable[[Tensor, tuple[slice, ...]], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def changed(value: Any, name: str = "") -> Any:
            if isinstance(value, dict):  # such as the outputs of an encoder
                return type(value)(**{key: changed(part) for key, part in value.items()})
            first = self.of_first(value) if isinstance(value, Tensor) else None
            if first is None or not (value.is_floating_point() or name in IDS or value is self.batch):
                return value
            if name.startswith("pixel_") and value is not self.batch:
                return value  # of images, whose number some models find by which pixels are not zero
            return change(value, first)

        return tuple(changed(x) for x in self.args), {name: changed(x, name) for name, x in self.kwargs.items()}


def _other(first: Tensor, special: set[int]) -> Tensor:
    if not first.is_floating_point():
        return _other_ids(first, special)
    noise = torch.arange(first.numel(), device=first.device, dtype=torch.float32).sin().view(first.shape)
    size = torch.nan_to_num(first.float(), 0, 0, 0).abs().sum().clamp(max=100) + 1
    return (first + noise * size).to(first.dtype)


def _one_token(value: Tensor, special: set[int], *, tokens: bool) -> Tensor:
    """Every token, or every vector of the last dimension, like the first one; special ids stay.

    A float tensor of two dimensions is one of rows unless `tokens`.
    """
    if value.is_floating_point():
        if value.ndim < (2 if tokens else 3):
            return value
        return value.flatten(0, -2)[:1].expand(value[..., 0].numel(), -1).reshape(value.shape)
    stays = torch.isin(value, torch.tensor(sorted(special), device=value.device, dtype=value.dtype))
    plain = value[~stays]
    return torch.where(stays, value, plain[0]) if plain.numel() else value


def _other_ids(ids: Tensor, special: set[int]) -> Tensor:
    """Other ids of a row, none above its largest or 1; special ones stay, unless there are only special ones."""
    if ids.dtype is torch.bool:
        return ~ids
    plain = [i for i in range(int(ids.max()) + 1 if ids.numel() else 0) if i not in special]
    following = dict(zip(plain, plain[1:] + plain[:1], strict=True))
    other = ids.clone().flatten()
    for at, token in enumerate(other.tolist()):
        other[at] = following.get(token, token)
    if torch.equal(other, ids.flatten()):
        other = torch.where(other > 0, other - 1, 1)
    return other.view(ids.shape)


def special_ids(module: nn.Module) -> set[int]:
    """The ids that the model's configuration names, such as `eos_token_id`."""
    config = getattr(module, "config", None)
    if config is None:
        return set()
    found: set[int] = set()
    settings = config.to_dict()
    for values in (settings, *(part for part in settings.values() if isinstance(part, dict))):
        for name, value in values.items():
            if isinstance(name, str) and name.endswith(("token_id", "token_index")):
                found.update(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
    return found
