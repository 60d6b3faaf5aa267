"""The forward passes of a mixed batch: check the number of rows, and find the order of rows in the model's activations.

A pre-hook runs before the model, and before those of its parts that generation calls on their own, such as an encoder.
For each new kind of input it runs the base model three times (as it is, with another first row, with equal tokens); see
`sites/routing.py`. In `generate`, a row of the batch becomes several of the decoder, one for each beam or sequence. The
rows of a packed batch are sequences that are end to end (`adapter/spans.py`).

Adapters that have changed are written to the banks again before a forward pass, except in the steps of a generation:
those take one token for each row, or continue from a KV cache.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reparam.adapter.spans import Spans, check_apart, lengths_of
from reparam.adapter.trials import Inputs, special_ids
from reparam.core.continuing import continues
from reparam.sites.routing import SMALL, Routing, Trial, note_orders, note_shared, shared_inputs

LEAK = 1e-4
"""The share of the largest difference up to which float32 outputs of packed sequences do not depend on each other."""
FIRST = ("inputs", "input_ids", "inputs_embeds", "input_features", "pixel_values")


class Mixed:
    """What a model does while one adapter for each row is selected."""

    def __init__(self, model: nn.Module, routing: Routing, renew: Callable[[list[str | None]], None]) -> None:
        self.model = model
        self.routing = routing
        self.renew = renew
        """Writes the slots of the adapters in a list that have changed."""
        self.sites: dict[str, nn.Module] = {}
        """The banks and the replaced modules by path."""
        self._slots = routing.slots
        self._names: list[str | None] = []
        self._spans: Spans | None = None
        self._times = 1
        self._handles: list[Any] = []
        self._outermost: nn.Module | None = None
        self._seen: set[tuple[Any, ...]] = set()
        self._generates = False
        self._generate: Any = None

    def start(self, slots: Tensor, names: list[str | None], sites: dict[str, nn.Module], spans: Spans | None) -> None:
        """Route the rows of the next batches, or the sequences of packed ones, to these slots [B]."""
        self.stop()
        if self.sites != sites:
            self.sites, self._seen = sites, set()
        self._slots, self._names, self._times, self._spans = slots, names, 0, spans
        self.routing.tried = True
        self._expand(1)
        model: Any = self.model
        encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
        for module in self.model.modules():
            if module is self.model or module is encoder or hasattr(module, "get_input_embeddings"):
                self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._after, always_call=True))
        if hasattr(self.model, "generate"):
            self._generate = vars(self.model).get("generate")
            # A bound method, so that a copy of the model has one of its own.
            self.model.generate = self._generated  # type: ignore[assignment]

    def stop(self) -> None:
        """End the mixed batch."""
        if self._handles and "generate" in vars(self.model):
            del self.model.generate
            if self._generate is not None:
                self.model.generate = self._generate
        for handle in self._handles:
            handle.remove()
        self._handles, self._outermost = [], None

    def _generated(self, *args: Any, **kwargs: Any) -> Any:
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
            names = [name for name in self._names for _ in range(times)]
            self.routing.route(self._slots.repeat_interleave(times), names)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValueError unless the batch has as many rows as there are selected names."""
        if self._outermost is not None:
            return
        named = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values())
        batch = next((x for x in named if isinstance(x, Tensor)), None)
        times = 1
        if self._spans is None:
            times = self._times_of(batch)
            lengths = None
        else:
            lengths = lengths_of(self._spans, len(self._names), batch, kwargs)
            check_apart(lengths, kwargs)
        assert batch is not None
        self._outermost = module
        if not (continues(kwargs) or _is_step(batch)):
            self.renew(self._names)
        self._expand(times)
        routing = self.routing
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1 and len(x) == len(batch)]
        routing.tokens = batch.shape[1] if batch.ndim > 1 else 1
        routing.lengths = frozenset(x.shape[1] for x in given)
        routing.packed = lengths
        given_as = frozenset(
            (name, value if isinstance(value, bool | int | str) else None)  # such as use_cache
            for name, value in kwargs.items()
            if value is not None
        )
        caches = getattr(getattr(module, "config", None), "use_cache", None)
        seen = (module, batch.ndim, len(args), given_as, routing.tokens == 1, caches, lengths is None)
        if len(set(self._names)) > 1 and seen not in self._seen:
            self._try(module, Inputs(args, kwargs, batch, lengths))
            self._seen.add(seen)

    def _times_of(self, batch: Tensor | None) -> int:
        """How many rows of the batch have the same name. Raises ValueError if the number of rows does not fit."""
        rows = len(self._names)
        found = 0 if batch is None or batch.ndim == 0 else len(batch)
        if found == 0 or (found != rows and not (self._generates and found % rows == 0)):
            shape = None if batch is None else list(batch.shape)
            raise ValueError(
                f"select got {rows} adapter names, one per row, but the batch has shape {shape}, which does not belong "
                f"to the {rows} rows of the mixed batch; select one name per row of the batch (of the input, with "
                f"num_beams or num_return_sequences above 1), or pass the spans of sequences that are end to end"
            )
        return found // rows

    def _after(self, module: nn.Module, *_: Any) -> None:
        if module is self._outermost:
            self._outermost = None

    @torch.no_grad()
    def _try(self, module: nn.Module, inputs: Inputs) -> None:
        """Find out the order of rows in the inputs of all sites, and check that rows do not depend on each other."""
        plain, output = self._run(module, inputs.args, inputs.kwargs)
        special = special_ids(module)
        try:
            other, changed = self._run(module, *inputs.with_another_first_row(set()))
        except (ValueError, RuntimeError, IndexError):  # a model can refuse rows with other special tokens
            other, changed = self._run(module, *inputs.with_another_first_row(special))
        same, _ = self._run(module, *inputs.with_one_token(special))
        self._check_apart(module, inputs, _main(output), _main(changed))
        note_orders(self.sites, plain, other, same, self.routing)
        if inputs.packed is None:
            self._share(module, inputs, shared_inputs(self.sites, plain, other, self.routing), plain, output)

    def _share(self, module: nn.Module, inputs: Inputs, sites: list[nn.Module], plain: Trial, output: Any) -> None:
        """Find out whether these sites can make an output for each row from an input that all rows share.

        That is so if the model's output for the first row, and no other, then changes with that of the site.
        """
        fit = []
        for site in sites:
            why = self._why_not(module, inputs, site, output)
            note_shared(site, plain, why)
            if not why:
                fit.append(site)
        if fit:  # sites that get what these return have rows in their input, too
            before, after = (self._run(module, inputs.args, inputs.kwargs, fit, changed)[0] for changed in ([], fit))
            note_orders(self.sites, before, after, before, self.routing)

    def _why_not(self, module: nn.Module, inputs: Inputs, site: nn.Module, output: Any) -> str:
        """Why the model cannot use an output of this site for each row; empty if it can. `output` is the base's."""
        start = "rows share it, and the model cannot use an output for each row"
        try:
            _, changed = self._run(module, inputs.args, inputs.kwargs, [site], [site])
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            return f"{start} ({(str(error).splitlines() or [''])[0]})"
        before, after = _main(output), _main(changed)
        first = None if before is None else inputs.of_first(before)
        if before is None or after is None or before.shape != after.shape or first is None:
            return f"{start} (its own output then has other dimensions)"
        difference = torch.nan_to_num(before.float() - after.float()).abs()
        most = float(difference[first].max())
        difference[first] = 0
        if most == 0 or float(difference.max()) > SMALL * most:
            return f"{start} (another output for the first row changes other rows, or nothing)"
        return ""

    def _check_apart(self, module: nn.Module, inputs: Inputs, before: Tensor | None, after: Tensor | None) -> None:
        """Raise ValueError if outputs of other rows changed with the first row."""
        if before is None or after is None or before.shape != after.shape:
            return
        first = inputs.of_first(before)
        if first is None:
            return
        difference = torch.nan_to_num(before.float() - after.float()).abs()
        most = difference.max()
        difference[first] = 0
        if inputs.packed is None:
            if bool(difference.max() > SMALL * most):
                raise ValueError(
                    f"the first dimension of the batch {list(inputs.batch.shape)} is not one of rows for "
                    f"{type(module).__name__}: the outputs of one row depend on the others; select one adapter at a "
                    f"time for this model"
                )
        elif bool(difference.max() > (LEAK if before.dtype is torch.float32 else SMALL) * most):
            raise ValueError(
                f"the sequences of the packed batch {list(inputs.batch.shape)} depend on each other; keep them apart "
                f"by position_ids that start at 0 in each, with use_cache=False (with a cache, transformers ignores "
                f"where they start), or by a mask; or give each sequence a row of its own"
            )

    def _run(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        shared: Sequence[nn.Module] = (),
        changed: Sequence[nn.Module] = (),
    ) -> tuple[Trial, Any]:
        """Run the base model, without touching what the arguments hold (such as a cache). The last two: see `Trial`."""
        trial = self.routing.trial = Trial(len(self.routing.slot_list), shared, changed)
        try:
            with _in_evaluation(self.model):
                output = module.forward(*map(_apart, args), **{name: _apart(value) for name, value in kwargs.items()})
        finally:
            self.routing.trial = None
        return trial, output


def _is_step(batch: Tensor) -> bool:
    """Whether a batch holds one token for each row, as in a step of generation."""
    return not batch.is_floating_point() and batch.ndim == 2 and batch.shape[1] == 1


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
