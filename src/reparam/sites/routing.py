"""Mixed batches: which part of an activation belongs to which row of the batch.

Sizes alone do not tell this: in a model that computes with [T, B, ...], an activation with T = B looks as if rows came
first, and an expert of a mixture of experts can get as many tokens as the batch has rows. So the base model runs twice,
the second time with another first row (`adapter/mixed.py`), and a `Trial` records the inputs of all sites. What differs
is the part of the first row. The order that this shows is noted at the site; any other activation is refused. In a
packed batch the rows are sequences of any length, end to end in one row.

Shapes: B rows of the batch, T tokens in a row.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from reparam.kernels.packs import Step
from reparam.sites.layout import Layout, Order, for_each_row

SMALL = 0.01
"""Differences below this share of the largest one are rounding."""
WHY = "why_not_shared"
"""The attribute of a site that tells why rows cannot share its input."""


class Routing:
    """The slot of each row of the next batches. All banks and replaced modules of a model share one object."""

    def __init__(self, slots: Tensor) -> None:
        self.route(slots)
        self.tokens: int | None = None
        """Tokens per row in the model's current input, or None if unknown."""
        self.lengths: frozenset[int] = frozenset()
        """Tokens per row in its other inputs, such as those of a decoder."""
        self.packed = None
        self.trial: Trial | None = None
        """What records the inputs of the sites, which then compute the base map."""
        self.tried = False
        """Whether a site needs an order that a trial has shown. Otherwise, rows come first."""

    def route(self, slots: Tensor, names: Sequence[str | None] = ()) -> None:
        """Use these slots [B], of the adapters with these names, for the rows of the next batches."""
        self.slots = slots  # [B] int64, -1 for the base model
        self.slot_list: tuple[int, ...] = tuple(slots.tolist())
        """The same numbers, for code that must not wait for the device."""
        self.used = frozenset(self.slot_list) - {-1}
        self.names = names  # [B]
        self._step: Step | None = None
        self._layouts: dict[torch.Size, Layout] = {}
        self._alike = len(set(names)) == 1

    @property
    def packed(self) -> tuple[int, ...] | None:
        """The tokens of each row, if the rows are end to end in one."""
        return self._packed

    @packed.setter
    def packed(self, lengths: tuple[int, ...] | None) -> None:
        """Set it, and where each row begins."""
        self._packed = lengths
        self._step, self._layouts = None, {}
        self.begins = torch.tensor([0, *itertools.accumulate(lengths or ())])  # [B + 1]

    @property
    def step(self) -> Step:
        """Rows that are end to end, for the compiled kernel. All sites of a forward pass use the same object."""
        if self._step is None:
            self._step = Step(self.begins, self.slots)
        return self._step

    def layout(self, site: nn.Module, shape: torch.Size) -> Layout:
        """How the input of a bank or a replaced module, [..., I], holds the rows. Raises ValueError if it is unknown.

        If all rows use one adapter, every activation is one row.
        """
        if shape in self._layouts:
            return self._layouts[shape]
        if self.tried and self._alike:
            return Layout("rows", 1, True)
        plain: Order = "rows" if self.packed is None else "packed"
        order = orders_of(site).get((plain == "packed", len(shape))) if self.tried else plain
        if order is None or not self.fits(order, shape):
            self.refuse(shape, site.__dict__.get(WHY, ""))
        if order == "shared":
            return Layout("rows", len(self.slot_list), False, shared=True)
        layout = Layout(order, len(self.slot_list), len(shape) == 2, self.packed or ())
        if not self.tried and self.packed is not None:  # the same at all sites
            self._layouts[shape] = layout
        return layout

    def split(self, shape: torch.Size) -> tuple[int, int]:
        """Rows and tokens of an activation of this shape in which rows come first. Raises ValueError if it has none."""
        if not self.fits("rows", shape):
            self.refuse(shape)
        return len(self.slots), shape[:-1].numel() // len(self.slots)

    def refuse(self, shape: torch.Size, why: str = "") -> NoReturn:
        """Raise ValueError: rows of an activation of this shape cannot be told apart."""
        raise ValueError(
            f"cannot map an activation of shape {list(shape)} to the {len(self.slot_list)} rows of the mixed batch"
            f"{why and ': '}{why}; select one adapter at a time for this model"
        )

    def fits(self, order: Order, shape: torch.Size) -> bool:
        """Whether an activation of this shape can hold the rows in this order."""
        rows = len(self.slot_list)
        if order == "shared":
            return len(shape) < 3 or shape[0] in (1, rows)
        if len(shape) < 2:
            return False
        if order == "packed":
            total = sum(self.packed or ())
            return shape[0] == total if len(shape) == 2 else shape[:2] == (1, total)
        if len(shape) == 2:
            many = shape[0] in [rows * tokens for tokens in (self.tokens, *self.lengths) if tokens is not None]
            return many or (order == "rows" and shape[0] == rows)
        return shape[0 if order == "rows" else 1] == rows


def orders_of(site: nn.Module) -> dict[tuple[bool, int], Order | None]:
    """The order of the site's inputs, as trials have shown; None if there is none.

    By whether the batch was packed, and by the number of dimensions of the input.
    """
    found: dict[tuple[bool, int], Order | None] = site.__dict__.setdefault("orders", {})
    return found


class Trial:
    """The inputs of all sites in one run of the base model.

    In a run for inputs that rows share, the sites `shared` make an output for each row, and `changed` makes another one
    for the first row.
    """

    def __init__(self, rows: int = 1, shared: Collection[nn.Module] = (), changed: Collection[nn.Module] = ()) -> None:
        self.calls: dict[nn.Module, list[tuple[torch.Size, Tensor]]] = {}
        self.ids: set[nn.Module] = set()
        """The sites that got ids."""
        self.whole: set[nn.Module] = set()
        """The sites that got more than one argument, or no tensor."""
        self.rows, self.shared, self.changed = rows, shared, changed

    def output(self, site: nn.Module, y: Any) -> Any:
        """What a site returns in this run, given its output."""
        if site not in self.shared:
            return y
        if not isinstance(y, Tensor):
            raise ValueError(f"it returns a {type(y).__name__}")
        y = for_each_row(y, self.rows)
        if site in self.changed:
            y = y.clone()
            noise = torch.arange(y[0].numel(), device=y.device, dtype=torch.float32).sin().view(y[0].shape)
            y[0] += (noise * (y.float().abs().amax() + 1)).to(y.dtype)
        return y

    def see(self, site: nn.Module, x: Tensor) -> None:
        """Note the shape of an input, and 8 numbers for each vector in it; ids are vectors of one number."""
        if not x.is_floating_point():
            self.ids.add(site)
        x = x.detach() if x.is_floating_point() else x.unsqueeze(-1)
        weights = torch.arange(1, 8 * x.shape[-1] + 1, device=x.device, dtype=torch.float32).cos().view(-1, 8)
        self.calls.setdefault(site, []).append((x.shape, x.reshape(-1, x.shape[-1]).float() @ weights))


def note_orders(sites: Mapping[str, nn.Module], plain: Trial, other: Trial, same: Trial, routing: Routing) -> None:
    """Note the order of each site's inputs, given two trials that differ in the first row. `sites` are by path.

    In the trial `same`, all tokens are the same: a site that then gets another number of them is one of experts.
    """
    patterns = {
        path: [[shape for shape, _ in trial.calls.get(site, [])] for trial in (plain, other, same)]
        for path, site in sites.items()
    }
    experts = _experts(patterns)
    for path, site in sites.items():
        if site in plain.whole:  # one of its inputs does not tell the order of its output
            continue
        found: dict[int, set[Order | None]] = {}
        pairs = zip(plain.calls.get(site, []), other.calls.get(site, []), strict=False)
        for (shape, before), (again, after) in pairs:
            if shape != again or (path in experts and len(shape) == 2):
                found.setdefault(len(shape), set()).add(None)
                continue
            fits = _orders(shape, before, after, routing)
            if fits is not None:
                found.setdefault(len(shape), set()).add(fits[0] if len(fits) == 1 else None)
        if patterns[path] != [patterns[path][0]] * 3:
            found = {len(shape): {None} for shapes in patterns[path] for shape in shapes}
        for ndim, orders in found.items():
            known, key = orders_of(site), (routing.packed is not None, ndim)
            agreed = orders | ({known[key]} if key in known else set())
            if agreed == {"rows", "shared"}:
                agreed = {"shared"}
            known[key] = agreed.pop() if len(agreed) == 1 else None


def shared_inputs(sites: Mapping[str, nn.Module], plain: Trial, other: Trial, routing: Routing) -> list[nn.Module]:
    """The sites whose input does not show an order: ids that do not differ with the first row, or several arguments."""
    found = []
    for site in sites.values():
        calls, others = plain.calls.get(site, []), other.calls.get(site, [])
        if site in plain.whole:
            found.append(site)
        elif (
            site in plain.ids
            and len(calls) == len(others)
            and all(
                shape == again and torch.equal(before, after)
                for (shape, before), (again, after) in zip(calls, others, strict=True)
            )
        ):
            orders = orders_of(site)
            known = [orders.get((False, len(shape))) for shape, _ in calls]
            if not all(order and routing.fits(order, shape) for order, (shape, _) in zip(known, calls, strict=True)):
                found.append(site)
    return found


def note_shared(site: nn.Module, trial: Trial, why: str) -> None:
    """Note that rows can share the inputs that the site got in this trial; or, if `why` is not empty, why not."""
    orders = orders_of(site)
    for shape, _ in trial.calls.get(site, []):
        key = (False, len(shape))
        refused = why or (key in orders and orders[key] not in ("rows", "shared"))
        orders[key] = None if refused else "shared"
    if why:
        site.__dict__[WHY] = why


def _orders(shape: torch.Size, before: Tensor, after: Tensor, routing: Routing) -> list[Order] | None:
    """The orders in which only the first row of an input differs; None if nothing differs."""
    rows, count = len(routing.slot_list), len(before)
    difference = torch.nan_to_num(before - after).abs().amax(1)
    if not count or not bool(difference.max() > 0):
        return None
    changed = (difference > SMALL * difference.max()).nonzero().squeeze(1)
    found: list[Order] = []
    inner = 1 if len(shape) == 2 else shape[2:-1].numel()
    if routing.packed is not None:
        inside = routing.fits("packed", shape) and bool((changed // max(inner, 1) < routing.packed[0]).all())
        return ["packed"] if inside else found
    if routing.fits("rows", shape) and bool((changed < count // rows).all()):
        found.append("rows")
    if routing.fits("tokens", shape) and bool((changed // max(inner, 1) % rows == 0).all()):
        found.append("tokens")
    if len(shape) == 2 and shape[0] == rows and "rows" in found:
        return ["rows"]  # one vector for each row
    return found


def _experts(patterns: Mapping[str, list[list[torch.Size]]]) -> set[str]:
    """The sites that get some of the tokens, which depend on the tokens.

    They are named so, or siblings in a list or dictionary of modules got other numbers of tokens or were not called.
    """
    found = {path for path in patterns if re.search(r"(^|\.)experts?(_?\d+)?\.", path)}
    siblings: dict[str, list[str]] = {}
    for path in patterns:
        for number in re.finditer(r"(?<=[._])\d+(?=\.|$)|^\d+(?=\.|$)", path):
            siblings.setdefault(f"{path[: number.start()]}*{path[number.end() :]}", []).append(path)
    for paths in siblings.values():
        shapes = [patterns[path] for path in paths]
        flat = any(len(shape) == 2 for calls in shapes for run in calls for shape in run)
        if flat and any(calls != shapes[0] for calls in shapes):
            found.update(paths)
    return found
