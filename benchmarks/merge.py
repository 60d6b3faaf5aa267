"""Time merging an adapter into a float32 model, relative to one memcpy of the merged weights; measure its memory.

Limit: `W.addmm_(B, A)` for every matrix, which is timed too. It reads and writes W once, while a memcpy also writes a
second buffer. It does not report rounding, does not check values, and does not remove the adapter's modules. Memory is
the peak of torch's allocator beyond what was held before, relative to the largest matrix.
"""

from __future__ import annotations

import copy

import measure as m
import torch

import reparam


class Contestant:
    """A model that gets a new adapter before each timed turn and merges it in the turn."""

    def __init__(self, model: torch.nn.Module, *, peft: bool) -> None:
        self.model, self.peft = model, peft

    def before(self) -> None:
        self.wrapped = m.with_peft(self.model) if self.peft else m.with_reparam(self.model)

    def merge(self) -> None:
        if self.peft:
            self.model = self.wrapped.merge_and_unload()
        else:
            reparam.merge(self.wrapped)


def main() -> None:
    quick = m.setup(__doc__)
    base = m.llama(m.TINY if quick else m.LLAMA)
    ours, theirs = Contestant(copy.deepcopy(base), peft=False), Contestant(copy.deepcopy(base), peft=True)
    weights = m.matrices(base)
    copies = [w.clone() for w in weights]
    factors = [(0.01 * torch.randn(len(w), m.RANK), 0.01 * torch.randn(m.RANK, w.shape[1])) for w in weights]

    def memcpy() -> None:
        for to, w in zip(copies, weights, strict=True):
            to.copy_(w)

    def addmm() -> None:
        for w, (b, a) in zip(weights, factors, strict=True):
            w.addmm_(b, a)

    work = {"memcpy": memcpy, "addmm": addmm, "ours": ours.merge, "peft": theirs.merge}
    before = {"ours": ours.before, "peft": theirs.before}
    times = m.interleave(work, rounds=2 if quick else 20, before=before)
    largest = max(w.nbytes for w in weights)
    peaks = {}
    for name, contestant in (("ours", ours), ("peft", theirs)):
        contestant.before()
        peaks[name] = m.peak_bytes(contestant.merge) / largest
    over = {name: times.over(name, "memcpy") for name in ("ours", "peft", "addmm")}
    rows = [
        m.Row(
            "merge of the whole model, over one memcpy of its weights", over["ours"], over["peft"], over["addmm"], 1.0
        ),
        m.Row("peak temporary, over the largest weight", peaks["ours"], peaks["peft"], 0.0, 0.1),
    ]
    m.show("Merging", rows, "python benchmarks/merge.py")


if __name__ == "__main__":
    main()
