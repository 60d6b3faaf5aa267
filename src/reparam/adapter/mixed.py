"""The forward passes of a mixed batch: check the number of rows, and find the order of rows in the model's activations.

A pre-hook runs before the model, and before those of its parts that generation calls on their own, such as an encoder.
For each new kind of input it runs the base model three times (as it is, with another first row, with equal tokens); see
`sites/routing.py`. In `generate`, a row of the batch becomes several of the decoder, one for each beam or sequence.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from reparam.sites.routing import SMALL, Routing, Trial, note_orders

IDS = ("input_ids", "decoder_input_ids")
FIRST = ("inputs", "input_ids", "inputs_embeds", "input_features", "pixel_values")


class Mixed:
    """What a model does while one adapter for each row is selected."""

    def __init__(self, model: nn.Module, routing: Routing) -> None:
        self.model = model
        self.routing = routing
        self.sites: dict[str, nn.Module] = {}
        """The banks and the replaced modules by path."""
        self._slots = routing.slots
        self._names: list[str | None] = []
        self._times = 1
        self._handles: list[Any] = []
        self._outermost: nn.Module | None = None
        self._seen: set[tuple[Any, ...]] = set()
        self._generates = False
        self._generate: Any = None

    def start(self, slots: Tensor, names: list[str | None], sites: dict[str, nn.Module]) -> None:
        """Route the rows of the next batches to these slots [B]."""
        self.stop()
        if self.sites != sites:
            self.sites, self._seen = sites, set()
        self._slots, self._names, self._times = slots, names, 0
        self.routing.tried = True
        self._expand(1)
        for module in self.model.modules():
            if module is self.model or hasattr(module, "get_input_embeddings"):
                self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._after, always_call=True))
        if hasattr(self.model, "generate"):
            self._generate = vars(self.model).get("generate")
            # A bound method, so that a copy of the model has one of its own.
            self.model.generate = MethodType(lambda mixed, *args, **named: mixed._generated(args, named), self)  # type: ignore[assignment]

    def stop(self) -> None:
        """End the mixed batch."""
        if self._handles and "generate" in vars(self.model):
            del self.model.generate
            if self._generate is not None:
                self.model.generate = self._generate
        for handle in self._handles:
            handle.remove()
        self._handles, self._outermost = [], None

    def _generated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's `generate`. With one name for each row of the input, the rows of beams have the names of it."""
        first = next((kwargs[name] for name in FIRST if isinstance(kwargs.get(name), Tensor)), None)
        batch = args[0] if args and isinstance(args[0], Tensor) else first
        self._generates = batch is not None and len(batch) == len(self._names)
        generate = self._generate or type(self.model).generate.__get__(self.model)  # type: ignore[attr-defined]
        try:
            return generate(*args, **kwargs)
        finally:
            self._generates = False

    def _expand(self, times: int) -> None:
        """Use each slot for so many rows, one after the other."""
        if times != self._times:
            self._times = times
            self.routing.route(self._slots.repeat_interleave(times))
            self.routing.names = [name for name in self._names for _ in range(times)]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValueError unless the batch has as many rows as there are selected names."""
        if self._outermost is not None:
            return
        named = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values())
        batch = next((x for x in named if isinstance(x, Tensor)), None)
        rows = len(self._names)
        found = 0 if batch is None or batch.ndim == 0 else len(batch)
        if found == 0 or (found != rows and not (self._generates and found % rows == 0)):
            shape = None if batch is None else list(batch.shape)
            raise ValueError(
                f"select got {rows} adapter names, one per row, but the batch has shape {shape}, which does not belong "
                f"to the {rows} rows of the mixed batch; select one name per row of the batch (of the input, with "
                f"num_beams or num_return_sequences above 1)"
            )
        assert batch is not None
        self._outermost = module
        self._expand(found // rows)
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1 and len(x) == found]
        self.routing.tokens = batch.shape[1] if batch.ndim > 1 else 1
        self.routing.lengths = frozenset(x.shape[1] for x in given)
        present = frozenset(name for name, value in kwargs.items() if value is not None)
        seen = (module, batch.ndim, len(args), present, self.routing.tokens == 1)
        if len(set(self._names)) > 1 and seen not in self._seen:
            self._try(module, batch, args, kwargs)
            self._seen.add(seen)

    def _after(self, module: nn.Module, *_: Any) -> None:
        if module is self._outermost:
            self._outermost = None

    @torch.no_grad()
    def _try(self, module: nn.Module, batch: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out the order of rows in the inputs of all sites, and check that rows do not depend on each other."""
        plain, output = self._run(module, args, kwargs)
        special = _special_ids(module)
        try:
            other, changed = self._run(module, *_with(_another_first_row, batch, args, kwargs, set()))
        except (ValueError, RuntimeError, IndexError):  # a model can refuse rows with other special tokens
            other, changed = self._run(module, *_with(_another_first_row, batch, args, kwargs, special))
        same, _ = self._run(module, *_with(_one_token, batch, args, kwargs, special))
        note_orders(self.sites, plain, other, same, self.routing)
        before, after = _main(output), _main(changed)
        if before is None or after is None or before.shape != after.shape or len(before) != len(batch):
            return
        by_row = torch.nan_to_num(before.float() - after.float()).abs().flatten(1).amax(1)
        if bool((by_row[1:] > SMALL * by_row.max()).any()):
            raise ValueError(
                f"the first dimension of the batch {list(batch.shape)} is not one of rows for {type(module).__name__}: "
                f"the outputs of one row depend on the others; select one adapter at a time for this model"
            )

    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Trial, Any]:
        """Run the base model, without touching what the arguments hold (such as a cache)."""
        trial = self.routing.trial = Trial()
        try:
            with _in_evaluation(self.model):
                output = module.forward(*map(_apart, args), **{name: _apart(value) for name, value in kwargs.items()})
        finally:
            self.routing.trial = None
        return trial, output


@contextlib.contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    trains = [module for module in model.modules() if module.training]
    for module in trains:
        module.training = False
    try:
        yield
    finally:
        for module in trains:
            module.training = True


def _apart(value: Any) -> Any:
    """A copy of an object that a forward pass can change, such as a cache; other values as they are."""
    plain = Tensor | Mapping | tuple | list | str | int | float | None
    return value if isinstance(value, plain) else copy.deepcopy(value)


def _main(output: Any) -> Tensor | None:
    """The tensor in a model's output that has one entry for each row, if any."""
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("last_hidden_state"))
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.ndim > 1 and output.is_floating_point() else None


def _with(
    change: Callable[[Tensor, set[int]], Tensor],
    batch: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    special: set[int],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with a change of the tokens (but for the special ones) and of the numbers that have rows."""

    def changed(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):  # such as the outputs of an encoder
            return type(value)(**{key: changed(part) for key, part in value.items()})
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(batch):
            return value
        return change(value, special) if value.is_floating_point() or name in IDS or value is batch else value

    return tuple(changed(x) for x in args), {name: changed(x, name) for name, x in kwargs.items()}


def _another_first_row(value: Tensor, special: set[int]) -> Tensor:
    first = value[0]
    if value.is_floating_point():
        noise = torch.arange(first.numel(), device=value.device, dtype=torch.float32).sin().view(first.shape)
        size = torch.nan_to_num(first.float(), 0, 0, 0).abs().sum().clamp(max=100) + 1
        other = (first + noise * size).to(value.dtype)
    else:
        other = _other_ids(first, special)
    return torch.cat([other.unsqueeze(0), value[1:]])


def _one_token(value: Tensor, special: set[int]) -> Tensor:
    """Every token, or every vector of the last dimension, like the first one; special ids stay."""
    if value.is_floating_point():
        return (
            value.flatten(0, -2)[:1].expand(value[..., 0].numel(), -1).reshape(value.shape) if value.ndim > 2 else value
        )
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


def _special_ids(module: nn.Module) -> set[int]:
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
