"""A step of PagedAdamW, in 32 and 8 bits, over one of torch's AdamW; the bytes it moves and holds.

The parameters are LoRA factors, r = 16 on all linear maps, most of them too small for bitsandbytes to page. Pages go to
a file. Seconds are wall-clock here, because a page moves while another one is updated; CPU seconds of both threads are
beside them. The least that has to move, of P pages with room for S: P - S are read and as many written in each step,
since every state is needed once and changed. An LRU cache that goes round in the order of parameters moves all P.

Distance: how far the parameters are from those of torch's AdamW after 50 steps with noisy gradients of one direction,
over how far those have come.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import bitsandbytes
import measure as m
import torch
from torch import nn

from reparam.optim import PagedAdamW, Paging

Optimizers = Mapping[str, torch.optim.Optimizer]


def factors(model: nn.Module) -> list[nn.Parameter]:
    """A copy of the shapes of its adapter, with gradients."""
    trained = [p for p in m.with_reparam(m.twin(model)).parameters() if p.requires_grad]
    fresh = [nn.Parameter(torch.empty_like(p).normal_(0, 0.02)) for p in trained]
    for p in fresh:
        p.grad = torch.randn_like(p)
    return fresh


def optimizers(model: nn.Module, page: int) -> dict[str, torch.optim.Optimizer]:
    """Each with parameters of its own. Budgets are shares of all pages."""
    made: dict[str, torch.optim.Optimizer] = {
        "torch.optim.AdamW": torch.optim.AdamW(factors(model), foreach=False),
        "bitsandbytes, 8 bits, unpaged": bitsandbytes.optim.AdamW8bit(factors(model)),
    }
    for bits in (32, 8):
        block = 2048 if bits == 32 else 520
        blocks = sum(-(-p.numel() // 256) for p in factors(model))
        pages = -(-blocks // (page // block))
        made[f"{bits} bits, unpaged"] = PagedAdamW(factors(model), bits=bits, page=page)
        for name, share in (("1/2", 2), ("1/4", 4)):
            budget = max(2, pages // share) * page
            made[f"{bits} bits, {name} resident"] = PagedAdamW(factors(model), bits=bits, page=page, budget=budget)
    return made


def moved(optimizer: PagedAdamW, steps: int = 4) -> tuple[float, float]:
    """Bytes read and written in a step, and the least that has to be."""
    before = optimizer.paging
    for _ in range(steps):
        optimizer.step()
    after = optimizer.paging
    found = (after.bytes_in + after.bytes_out - before.bytes_in - before.bytes_out) / steps
    return found, 2 * (after.total - after.peak_resident)


def distance(make: Mapping[str, type | object], steps: int) -> dict[str, float]:
    """Of each optimizer from the first, relative to how far that one has come."""
    ends = {}
    for name, cls in make.items():
        draw = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.zeros(64, 256))
        towards = torch.randn(64, 256, generator=draw) ** 3
        optimizer = cls([p])
        for _ in range(steps):
            p.grad = towards * torch.randn(64, 256, generator=draw).add_(1)
            optimizer.step()
        ends[name] = p.detach()
    first = next(iter(ends.values()))
    return {name: float((end - first).norm() / first.norm()) for name, end in ends.items()}


def main() -> None:
    quick = m.setup(__doc__)
    model = m.llama(m.TINY if quick else m.LLAMA)
    page = 2**13 if quick else 2**18
    contestants = optimizers(model, page)
    elements = sum(p.numel() for p in factors(model))
    calls: dict[str, m.Call] = {name: optimizer.step for name, optimizer in contestants.items()}
    rounds = 3 if quick else 30
    wall = m.interleave(calls, rounds=rounds, clock=time.perf_counter)
    cpu = m.interleave(calls, rounds=rounds)

    print(f"### Paged AdamW, {elements:,} elements in {len(factors(model))} tensors, pages of {page // 1024} KiB\n")
    print("| optimizer | step over torch's | CPU over torch's | MB moved a step | least | resident bytes per element |")
    print("|---|---|---|---|---|---|")
    for name, optimizer in contestants.items():
        ratios = f"{wall.over(name, 'torch.optim.AdamW'):.2f} | {cpu.over(name, 'torch.optim.AdamW'):.2f}"
        if isinstance(optimizer, PagedAdamW):
            found, least = moved(optimizer)
            paging: Paging = optimizer.paging
            rest = f"{found / 1e6:.2f} | {least / 1e6:.2f} | {paging.peak_resident / elements:.2f}"
        else:
            states = [s for p in optimizer.state.values() for s in p.values() if isinstance(s, torch.Tensor)]
            own = {s.data_ptr(): s.nbytes for s in states if s.numel() > 1}  # its maps are shared
            rest = f"0 | 0 | {sum(own.values()) / elements:.2f}"
        print(f"| {name} | {ratios} | {rest} |")
    seconds = wall.median("torch.optim.AdamW")
    print(f"\nA step of torch's: {seconds * 1e3:.2f} ms. Distance after 50 steps: ", end="")
    kinds = {
        "torch": lambda p: torch.optim.AdamW(p, 1e-2),
        "8 bits": lambda p: PagedAdamW(p, 1e-2, bits=8),
        "bitsandbytes": lambda p: bitsandbytes.optim.AdamW8bit(p, 1e-2),
    }
    far = distance(kinds, 50)
    print(", ".join(f"{name} {far[name]:.4f}" for name in kinds if name != "torch"))
    print("\n    python benchmarks/paged.py\n")


if __name__ == "__main__":
    main()
