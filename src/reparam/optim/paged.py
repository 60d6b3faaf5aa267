"""AdamW with paged states, after QLoRA (arXiv 2305.14314, section 3), in float32 or in blockwise 8 bits.

All states are one flat sequence, cut into pages: many small factors share a page, and a large tensor spans several
(bitsandbytes pages whole tensors, and none below 100,000 elements). A step walks the pages in the order of the
parameters, with the next one on its way while one is updated. The step after it walks them back: what is on the device
at the end of one is what the other begins with, so that of P pages with room for S only P - S are read and written,
where going round would move all P. AdamW works element by element, so that neither pages nor the way through them
change a bit of the result.
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
    """AdamW whose states are held in pages, of which at most a budget is on the device.

    With 32 bits and parameters in float32 it computes what `torch.optim.AdamW` does, on a CPU bit for bit, and either
    loads the other's state dict. With 8 bits, moments are rounded after each step. Parameters in bfloat16 and float16
    are updated in float32 and rounded.

    Args:
        params: parameters, or groups of them; contiguous, of one device.
        lr: learning rate, at least 0.
        betas: decay of the mean and of the mean square, from 0 to below 1.
        eps: added to the root of the mean square, at least 0.
        weight_decay: decoupled weight decay, at least 0.
        bits: 32 or 8, per moment and element.
        budget: the most bytes of states on the device; None for all. A step needs some room beside them, up to 24
            bytes per element of one page.
        page: bytes of a page, rounded down to whole blocks of 2048 bytes (32 bits) or 520 bytes (8 bits). Two pages in
            the budget are needed to move one while the other is updated.
        folder: where the file is that a CPU's pages move to; by default the system's folder for temporary files, which
            on some systems is memory. A CUDA device's pages move to host memory.

    Raises:
        ValueError: a value out of range, a parameter of another kind; all that is wrong with the settings at once.
        OSError: in `step` or `load_state_dict`: the pages do not fit on the disk, or it fails.

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
        """What the pager has done since the optimizer was made or loaded."""
        return self._pager.paging if self._pager is not None else Paging()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the new group's states follow those that are there.

        Raises ValueError for settings out of range, and parameters that are not contiguous or of another dtype.
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
        """Update the parameters that have a gradient; returns the closure's loss, if there is a closure.

        Raises:
            ValueError: sparse gradients, or parameters that are not all on the device of the states.
            OSError: the pages do not fit on the disk, or it fails.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in present):
            raise ValueError("PagedAdamW takes no sparse gradients: make the embedding with sparse=False")
        if not present:
            return loss
        self._advance(present)
        return loss

    def _advance(self, present: list[Tensor]) -> None:
        pager = self._ready(present)
        for parameter in present:
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.tensor(0.0)  # as torch keeps it
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
        """As torch's, a copy on the CPU; the same whatever the budget and the page.

        For each parameter that was updated: `step`, and `exp_avg` and `exp_avg_sq` in its shape, float32; or with 8
        bits uint8, and `exp_avg_scale` and `exp_avg_sq_scale`, float32, one for every 256 elements.
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
        """Continue from a state dict, bit for bit; budget and page may be others. Counters begin again.

        Raises:
            ValueError: it is of other parameters, of other bits, or of another optimizer; nothing is changed then.
            OSError: the pages do not fit on the disk, or it fails.
        """
        groups, saved = self.param_groups, state_dict["param_groups"]
        there, here = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
        if there != here:
            raise ValueError(f"the saved state has groups of {there} parameters, and this optimizer of {here}")
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
        """Within it parameters become smaller; see `reparam.core.shrink`. Moments of 8 bits are rounded anew."""
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
        """The pager, made when it is first needed: parameters may move to their device until then."""
        if self._pager is None:
            device = parameters[0].device
            self._pager = Pager(self._flat.page, slots=self._slots, device=device, folder=self._folder)
            self._states = make_states(self.bits, device)
        elsewhere = [p.device for p in parameters if p.device != self._pager.device]
        if elsewhere:
            raise ValueError(
                f"states are on {self._pager.device} and a parameter is on {elsewhere[0]}: one optimizer for each "
                "device; after moving parameters, load the state dict again"
            )
        self._pager.grow(self._flat.pages)
        return self._pager

    def _update(self, run: list[Piece], page: Tensor, settings: dict[Tensor, dict[str, Any]]) -> None:
        """Update pieces whose blocks are next to each other."""
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
                m[rest] = v[rest] = 0  # it must not reach the scale of the last block
        self._states.write(fields, m, v)

    def _update_piece(self, piece: Piece, m: Tensor, v: Tensor, group: dict[str, Any]) -> None:
        parameter = piece.parameter
        assert parameter.grad is not None
        flat = parameter.view(-1)[piece.elements]
        master = flat.float()  # itself, if it is float32
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
            raise ValueError(f"the saved state has {other} bits and this optimizer {self.bits}: set bits={other}")
        if state.keys() != {"step", *own}:
            raise ValueError(
                f"parameter {number}: the saved state holds {', '.join(sorted(state))}, and one of {self.bits} bits "
                f"holds {', '.join(sorted({'step', *own}))}: it is of another optimizer"
            )
        for name, tensor in own.items():
            if state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
                raise ValueError(
                    f"parameter {number}: the saved {name} is {dtype_and_shape(state[name])}, and this optimizer's is "
                    f"{dtype_and_shape(tensor)}: it was saved with another model"
                )


def _runs(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces of a page, those next to each other together."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        if runs and runs[-1][-1].blocks.stop == piece.blocks.start:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs
