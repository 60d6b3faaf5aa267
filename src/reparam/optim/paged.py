"""AdamW with paged states (QLoRA, arXiv 2305.14314, section 3), in float32 or blockwise 8 bits.

All states form one flat sequence, which is divided into pages: many small factors share a page, and a large tensor
spans several. (bitsandbytes pages whole tensors, and only those of at least 100,000 elements.) A step updates the pages
in the order of the parameters and prefetches the next page while it updates one. The following step goes through the
pages in reverse, so it starts with those that are still on the device: with P pages and room for S, a step moves only
P - S pages, not all P. AdamW is elementwise, so neither paging nor this order changes the result.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from reparam.core.shrink import Cuts
from reparam.optim.adamw import FIELDS, States, adamw_, make_states, narrowed
from reparam.optim.blockwise import BLOCK
from reparam.optim.checks import check_group, check_pages, dtype_and_shape
from reparam.optim.flat import Flat, Piece
from reparam.optim.pager import Pager, Paging


class PagedAdamW(torch.optim.Optimizer):
    """AdamW that keeps its states in pages and at most `budget` bytes of them on the device (arXiv 2305.14314, §3).

    With 32 bits and float32 parameters it computes the same as `torch.optim.AdamW`, on a CPU bit for bit, and the two
    can load each other's state dicts. With 8 bits, the moments are rounded after each step. Parameters in bfloat16 and
    float16 are updated in float32 and then rounded.

    Args:
        params: parameters or parameter groups; contiguous float32, bfloat16 or float16 tensors, all on one device.
        lr: learning rate, at least 0.
        betas: decay rates of the first and second moment, each from 0 to below 1.
        eps: added to the square root of the second moment, at least 0.
        weight_decay: decoupled weight decay, at least 0.
        bits: 32 or 8, per moment and element.
        budget: the maximum bytes of states on the device; None for no limit. A step needs additional memory, up to
            24 bytes per element of one page.
        page: bytes of a page, rounded down to whole blocks of 2048 bytes (32 bits) or 520 bytes (8 bits). The budget
            must hold two pages for one to be transferred while the other is updated.
        folder: the folder of the page file if the parameters are on the CPU; by default the system's temporary
            folder, which on some systems is in memory. On a CUDA device, pages move to pinned host memory.

    Raises:
        ValueError: a setting is out of range, or a parameter has another dtype or is not contiguous.
        OSError: (in `step` or `load_state_dict`) the page file does not fit on the disk or cannot be read or written.

    >>> layer = torch.nn.Linear(512, 512)
    >>> optimizer = PagedAdamW(layer.parameters(), lr=1e-3, bits=8, budget=2**18, page=2**17)
    >>> for _ in range(2):
    ...     layer(torch.ones(1, 512)).sum().backward()
    ...     optimizer.step()
    >>> optimizer.paging.peak_resident <= 2**18 < optimizer.paging.total
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        bits: int = 32,
        budget: int | None = None,
        page: int = 2**20,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        check_pages(bits, budget, page, folder)
        self.bits, self._folder = bits, folder
        self._flat = Flat(FIELDS[bits], page=page)
        self._slots = None if budget is None else budget // self._flat.page
        self._pager: Pager | None = None
        self._states: States | None = None
        self._backwards = False
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @property
    def paging(self) -> Paging:
        """Counters of the pager since the optimizer was created or its state was loaded."""
        return self._pager.paging if self._pager is not None else Paging()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch. Its states are placed after the existing ones.

        Raises ValueError if a setting is out of range, or if a parameter has another dtype or is not contiguous.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        for parameter in group["params"]:
            self._flat.add(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient. Returns the closure's loss, or None without a closure.

        Raises:
            ValueError: a gradient is sparse, or a parameter is not on the device of the states.
            OSError: the page file does not fit on the disk or cannot be read or written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in present):
            raise ValueError("PagedAdamW does not support sparse gradients: create the embedding with sparse=False")
        if not present:
            return loss
        self._advance(present)
        return loss

    def _advance(self, present: list[Tensor]) -> None:
        pager = self._ready(present)
        for parameter in present:
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.tensor(0.0)  # a float tensor, as in torch
            state["step"] += 1
        settings = {p: group for group in self.param_groups for p in group["params"]}
        walk = self._flat.walk(present)
        order = sorted(walk, reverse=self._backwards)
        for number, index in enumerate(order):
            page = pager.page(index)
            for following in order[number + 1 : number + 2]:
                pager.prefetch(following)
            for run in _runs(walk[index]):
                self._update(run, page, settings)
        self._backwards = not self._backwards

    def state_dict(self) -> dict[str, Any]:
        """The state dict in torch's format, as a copy on the CPU. It does not depend on `budget` and `page`.

        For each parameter that was updated it has `step`, and `exp_avg` and `exp_avg_sq` in the parameter's shape. They
        are float32; with 8 bits they are uint8, and `exp_avg_scale` and `exp_avg_sq_scale` hold one float32 for every
        256 elements.
        """
        saved = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        own = {p: self._flat.empty(p) for p in parameters if p in self.state}
        for index, pieces in self._flat.walk(own).items():
            assert self._pager is not None
            page = self._pager.peek(index)
            for piece in pieces:
                for to, part in self._flat.beside(piece, page, own[piece.parameter]):
                    to.copy_(part)
        saved["state"] = {
            i: {"step": self.state[p]["step"].clone(), **own[p]} for i, p in enumerate(parameters) if p in own
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state dict, bit for bit. `budget` and `page` may differ from those it was saved with.

        The counters in `paging` start again from 0.

        Raises:
            ValueError: it was saved for other parameters, with other bits, or by another optimizer; nothing is changed.
            OSError: the page file does not fit on the disk or cannot be read or written.
        """
        groups, saved = self.param_groups, state_dict["param_groups"]
        there, here = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
        if there != here:
            raise ValueError(
                f"the saved state has parameter groups of sizes {there}, but this optimizer has {here}: create "
                "it with the same groups"
            )
        for group in saved:
            check_group({**group, "params": []})
        ids = [i for group in saved for i in group["params"]]
        parameters = [p for group in groups for p in group["params"]]
        states = {p: state_dict["state"][i] for i, p in zip(ids, parameters, strict=True) if i in state_dict["state"]}
        for number, parameter in enumerate(parameters):
            if parameter in states:
                self._check_state(number, parameter, states[parameter])
        super().load_state_dict({"state": {}, "param_groups": saved})
        self._pager = self._states = None
        if states:
            self._fill(states)

    @contextlib.contextmanager
    def shrinking(self, cuts: Cuts) -> Iterator[None]:
        """A context in which parameters become smaller (`reparam.core.shrink`). 8-bit moments are quantized again."""
        saved, parameters = self.state_dict(), [p for group in self.param_groups for p in group["params"]]
        yield
        self._flat = Flat(self._flat.fields, page=self._flat.page)
        for number, parameter in enumerate(parameters):
            self._flat.add(parameter)
            if parameter in cuts and number in saved["state"]:
                saved["state"][number] = narrowed(saved["state"][number], *cuts[parameter], bits=self.bits)
        self.load_state_dict(saved)

    def _fill(self, states: dict[Tensor, dict[str, Any]]) -> None:
        pager = self._ready(list(states))
        for parameter, state in states.items():
            self.state[parameter] = {"step": torch.tensor(float(state["step"]))}
        for index, pieces in self._flat.walk(states).items():
            page = pager.page(index)
            for piece in pieces:
                own = {name: value for name, value in states[piece.parameter].items() if name != "step"}
                for part, of_page in self._flat.beside(piece, page, own):
                    of_page.copy_(part)

    def _ready(self, parameters: list[Tensor]) -> Pager:
        """The pager, created when it is first needed, so that parameters can be moved to their device before."""
        if self._pager is None:
            device = parameters[0].device
            self._pager = Pager(self._flat.page, slots=self._slots, device=device, folder=self._folder)
            self._states = make_states(self.bits, device)
        elsewhere = [p.device for p in parameters if p.device != self._pager.device]
        if elsewhere:
            raise ValueError(
                f"the states are on {self._pager.device} but a parameter is on {elsewhere[0]}: use one optimizer per "
                "device, and load the state dict again after moving parameters"
            )
        self._pager.grow(self._flat.pages)
        return self._pager

    def _update(self, run: list[Piece], page: Tensor, settings: dict[Tensor, dict[str, Any]]) -> None:
        """Update the pieces of a run, whose blocks are adjacent in the page."""
        assert self._states is not None
        first, last = run[0].blocks.start, run[-1].blocks.stop
        fields = self._flat.cut(page, slice(first, last))
        m, v = (moment.view(-1) for moment in self._states.read(fields))
        for piece in run:
            begin = (piece.blocks.start - first) * BLOCK
            end = begin + piece.elements.stop - piece.elements.start
            self._update_piece(piece, m[begin:end], v[begin:end], settings[piece.parameter])
            rest = slice(end, (piece.blocks.stop - first) * BLOCK)
            if end < rest.stop:
                m[rest] = v[rest] = 0  # padding must not affect the scale of the last block
        self._states.write(fields, m, v)

    def _update_piece(self, piece: Piece, m: Tensor, v: Tensor, group: dict[str, Any]) -> None:
        parameter = piece.parameter
        assert parameter.grad is not None
        flat = parameter.view(-1)[piece.elements]
        master = flat.float()  # a view if it is float32
        adamw_(
            master,
            parameter.grad.reshape(-1)[piece.elements].float(),
            m,
            v,
            step=self.state[parameter]["step"].item(),
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        if master.dtype != flat.dtype:
            flat.copy_(master)

    def _check_state(self, number: int, parameter: Tensor, state: dict[str, Any]) -> None:
        own = self._flat.empty(parameter)
        other = 8 if self.bits == 32 else 32
        if state.keys() == {"step", *(field.name for field in FIELDS[other])}:
            raise ValueError(f"the saved state has {other} bits but this optimizer has {self.bits}: set bits={other}")
        if state.keys() != {"step", *own}:
            raise ValueError(
                f"parameter {number}: the saved state has {', '.join(sorted(state))}, but one of {self.bits} bits has "
                f"{', '.join(sorted({'step', *own}))}: it was saved by another optimizer"
            )
        for name, tensor in own.items():
            if state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
                raise ValueError(
                    f"parameter {number}: the saved {name} is {dtype_and_shape(state[name])}, but this optimizer needs "
                    f"{dtype_and_shape(tensor)}: it was saved for another model"
                )


def _runs(pieces: list[Piece]) -> list[list[Piece]]:
    """Group the pieces of a page into runs of adjacent blocks."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        if runs and runs[-1][-1].blocks.stop == piece.blocks.start:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs
