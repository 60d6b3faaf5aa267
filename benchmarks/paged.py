"""Time a step of PagedAdamW with 32-bit and 8-bit states relative to torch's AdamW; count bytes moved and held.

The parameters are LoRA factors with r = 16 on all linear layers; most of them are too small for bitsandbytes to page.
Pages go to a file. Times are wall-clock seconds, because a page moves while another is updated; CPU seconds of both
threads are listed too. With P pages and room for S, the minimum to move per step is P - S pages read and P - S pages
written, because every state is used and changed once. An LRU cache in the order of the parameters moves all P pages.

Distance: the norm of the difference to the parameters of torch's AdamW after 50 steps with noisy gradients around one
direction, relative to the norm of the latter's change.
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
    """Random parameters and gradients with the shapes of a LoRA adapter of the model."""
    trained = [p for p in m.with_reparam(m.twin(model)).parameters() if p.requires_grad]
    fresh = [nn.Parameter(torch.empty_like(p).normal_(0, 0.02)) for p in trained]
    for p in fresh:
        p.grad = torch.randn_like(p)
    return fresh


def optimizers(model: nn.Module, page: int) -> dict[str, torch.optim.Optimizer]:
    """Optimizers by name, each with its own parameters. Resident budgets are shares of all pages of `page` bytes."""
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
    """Bytes read and written per step, and the minimum."""
    before = optimizer.paging
    for _ in range(steps):
        optimizer.step()
    after = optimizer.paging
    found = (after.bytes_in + after.bytes_out - before.bytes_in - before.bytes_out) / steps
    return found, 2 * (after.total - after.peak_resident)


def distance(make: Mapping[str, type | object], steps: int) -> dict[str, float]:
    """Distance of each optimizer's parameters from the first's, relative to the first's change."""
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
    print(
        "| optimizer | step over torch's | CPU over torch's | MB moved in a step | minimum | resident bytes/element |"
    )
    print("|---|---|---|---|---|---|")
    for name, optimizer in contestants.items():
        ratios = f"{wall.over(name, 'torch.optim.AdamW'):.2f} | {cpu.over(name, 'torch.optim.AdamW'):.2f}"
        if isinstance(optimizer, PagedAdamW):
            found, least = moved(optimizer)
            paging: Paging = optimizer.paging
            rest = f"{found / 1e6:.2f} | {least / 1e6:.2f} | {paging.peak_resident / elements:.2f}"
        else:
            states = [s for p in optimizer.state.values() for s in p.values() if isinstance(s, torch.Tensor)]
            own = {
                s.data_ptr(): s.nbytes for s in states if s.numel() > 1
            }  # the quantization maps are shared and do not count
            rest = f"0 | 0 | {sum(own.values()) / elements:.2f}"
        print(f"| {name} | {ratios} | {rest} |")
    seconds = wall.median("torch.optim.AdamW")
    print(f"\nA step of torch's AdamW: {seconds * 1e3:.2f} ms. Distance after 50 steps: ", end="")
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
